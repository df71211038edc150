"""§4.1, Optimization: SGD as Caffe2 and Detectron run it, and learning-rate schedules."""

import math

import keras
from keras import ops

RATE_JUMP = 1.1  # Detectron: the factor from which a change of the learning rate is one that the momentum must follow


@keras.saving.register_keras_serializable("retinanet_keras")
class SGD(keras.optimizers.SGD):
    """SGD with momentum whose L2 penalty is part of the gradient, for kernels only, and whose biases learn faster.

    Keras's own `weight_decay` bypasses the momentum and decays every variable; Caffe2's, the paper's, does neither.
    Both fold the learning rate into the momentum buffer, so Detectron rescales the buffer where the rate jumps, as at
    the schedule's drops; else the steps after a drop would still have the size of those before.

    Args:
        l2: weight of the penalty; `l2 * kernel` is added to the gradient before the momentum.
        bias_rate: factor on the gradient of biases (Detectron: 2).
    """

    def __init__(self, learning_rate=0.01, momentum=0.9, l2=1e-4, bias_rate=2.0, name="SGD", **kwargs):
        super().__init__(learning_rate, momentum=momentum, name=name, **kwargs)
        self.l2 = l2
        self.bias_rate = bias_rate

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.last_rate = self.add_variable((), name="last_rate", aggregation="only_first_replica")

    def apply(self, grads, trainable_variables=None):
        rate = self.learning_rate  # of this step, which `apply` counts
        super().apply(grads, trainable_variables)
        self.last_rate.assign(rate)

    def update_step(self, gradient, variable, learning_rate):
        # On TensorFlow `variable` is one without a path; the optimizer's own list has Keras's variables.
        kind = self._trainable_variables[self._get_variable_index(variable)].path.rsplit("/", 1)[-1]
        if kind == "kernel":
            gradient = gradient + ops.cast(self.l2, gradient.dtype) * ops.cast(variable, gradient.dtype)
        elif kind == "bias":
            gradient = gradient * ops.cast(self.bias_rate, gradient.dtype)
        if not self.momentum:
            return super().update_step(gradient, variable, learning_rate)
        # Keras's own step but for the correction, which costs no pass over the buffer of its own.
        buffer = self.momentums[self._get_variable_index(variable)]
        if keras.backend.backend() == "tensorflow":
            return self._fused_step(gradient, variable, buffer, learning_rate)
        momentum = ops.cast(self.momentum, buffer.dtype) * ops.cast(
            self._momentum_correction(learning_rate), buffer.dtype
        )
        step = ops.cast(gradient, buffer.dtype) * ops.cast(learning_rate, buffer.dtype)
        self.assign(buffer, buffer * momentum - step)
        self.assign_add(variable, buffer * ops.cast(self.momentum, buffer.dtype) - step if self.nesterov else buffer)

    def _fused_step(self, gradient, variable, buffer, learning_rate):
        """The same as one operation, where the plain ones pass over weights and buffer five times."""
        import tensorflow as tf

        def of(value):
            return tf.cast(value, variable.dtype)

        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle, accum=buffer.value.handle, lr=of(learning_rate), grad=of(gradient),
            momentum=of(self.momentum) * of(self._momentum_correction(learning_rate)), use_nesterov=self.nesterov,
        )  # fmt: skip

    def _momentum_correction(self, rate):
        """New rate over old where it jumps, else 1."""
        rate, last = ops.cast(rate, "float32"), ops.cast(self.last_rate, "float32")
        change = rate / ops.where(last > 0, last, 1.0)
        jumps = (last > 0) & (ops.maximum(change, 1.0 / ops.maximum(change, 1e-12)) > RATE_JUMP)
        return ops.where(jumps, change, 1.0)

    def get_config(self):
        return {**super().get_config(), "l2": self.l2, "bias_rate": self.bias_rate}


@keras.saving.register_keras_serializable("retinanet_keras")
class AdamW(keras.optimizers.AdamW):
    """AdamW that decays kernels only, its step one operation on TensorFlow where Keras's has a dozen.

    A class, as Keras does not save exclusions with a model.
    """

    def __init__(self, learning_rate=0.001, weight_decay=0.004, name="AdamW", **kwargs):
        super().__init__(learning_rate, weight_decay=weight_decay, name=name, **kwargs)
        self.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])

    def update_step(self, gradient, variable, learning_rate):
        if keras.backend.backend() != "tensorflow" or self.amsgrad:
            return super().update_step(gradient, variable, learning_rate)
        import tensorflow as tf

        def of(value):
            return tf.cast(value, variable.dtype)

        index, step = self._get_variable_index(variable), of(self.iterations + 1)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=self._momentums[index].value.handle, v=self._velocities[index].value.handle,
            beta1_power=of(self.beta_1) ** step, beta2_power=of(self.beta_2) ** step, lr=of(learning_rate),
            beta1=of(self.beta_1), beta2=of(self.beta_2), epsilon=of(self.epsilon), grad=of(gradient),
        )  # fmt: skip


@keras.saving.register_keras_serializable("retinanet_keras")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from a third of the rate (Detectron), then steps (§4.1) or a cosine to zero.

    Args:
        rate: after warm-up.
        iterations: steps in all; where the cosine ends.
        warmup: steps of warm-up.
        drops: steps at which the rate is divided by 10; None for the cosine.
    """

    def __init__(self, rate, iterations, warmup=500, drops=(60_000, 80_000)):
        self.rate, self.iterations, self.warmup = rate, iterations, warmup
        self.drops = None if drops is None else tuple(drops)

    def __call__(self, step):
        step = ops.cast(step, "float32")
        if self.drops is None:
            share = ops.clip((step - self.warmup) / max(1, self.iterations - self.warmup), 0.0, 1.0)
            rate = self.rate * 0.5 * (1.0 + ops.cos(math.pi * share))
        else:
            passed = sum(ops.cast(step >= drop, "float32") for drop in self.drops)
            rate = self.rate * ops.power(0.1, passed)
        if not self.warmup:
            return rate
        return rate * ops.minimum(1.0, 1.0 / 3.0 + 2.0 / 3.0 * step / self.warmup)

    def get_config(self):
        return {"rate": self.rate, "iterations": self.iterations, "warmup": self.warmup, "drops": self.drops}


def build(train):
    """The optimizer of a TrainConfig, its rate by the linear scaling rule where that applies."""
    drops = None if train.schedule == "cosine" else train.drops
    schedule = Schedule(train.scaled_rate, train.iterations, train.warmup, drops)
    if train.optimizer == "adamw":
        return AdamW(schedule, weight_decay=train.weight_decay, global_clipnorm=train.clip_norm)
    return SGD(
        schedule, momentum=train.momentum, l2=train.weight_decay, bias_rate=train.bias_rate,
        global_clipnorm=train.clip_norm,
    )  # fmt: skip
