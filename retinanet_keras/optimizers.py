"""§4.1, Optimization: SGD as Caffe2 and Detectron run it, and learning-rate schedules."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

from retinanet_keras import keras_hooks
from retinanet_keras.config import TrainConfig
from retinanet_keras.tensors import Tensor

Rate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule

RATE_JUMP = 1.1  # Detectron: the factor from which a change of the learning rate is one that the momentum must follow


@keras.saving.register_keras_serializable("retinanet_keras", name="SGD")  # the name in files
class CoupledSGD(keras.optimizers.SGD):
    """SGD with momentum whose L2 penalty is part of the gradient, for kernels only, and whose biases learn faster.

    Keras's own `weight_decay` bypasses the momentum and decays every variable; Caffe2's, the paper's, does neither.
    Both fold the learning rate into the momentum buffer, so Detectron rescales the buffer where the rate jumps, as at
    the schedule's drops; else the steps after a drop would still have the size of those before.

    Args:
        learning_rate: float or LearningRateSchedule.
        momentum: float.
        l2: float. Weight of the penalty: `l2 * kernel` is added to the gradient before the momentum.
        bias_rate: float. Factor on the gradient of biases (Detectron: 2).
        name: str. Name of the optimizer.
        **kwargs: Further arguments of `keras.optimizers.SGD`.
    """

    def __init__(
        self,
        learning_rate: Rate = 0.01,
        momentum: float = 0.9,
        l2: float = 1e-4,
        bias_rate: float = 2.0,
        name: str = "SGD",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, momentum=momentum, name=name, **kwargs)
        self.l2 = l2
        self.bias_rate = bias_rate

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self.last_rate = self.add_variable((), name="last_rate", aggregation="only_first_replica")

    def apply(self, grads: list[Tensor], trainable_variables: list[keras.Variable] | None = None) -> None:
        rate = self.learning_rate  # of this step, which `apply` counts
        super().apply(grads, trainable_variables)
        self.last_rate.assign(rate)

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        kind = keras_hooks.variable_path(self, variable).rsplit("/", 1)[-1]
        if kind == "kernel":
            gradient = gradient + ops.cast(self.l2, gradient.dtype) * ops.cast(variable, gradient.dtype)
        elif kind == "bias":
            gradient = gradient * ops.cast(self.bias_rate, gradient.dtype)
        if not self.momentum:
            return super().update_step(gradient, variable, learning_rate)
        # Keras's own step but for the correction, which needs no extra pass over the buffer.
        buffer = self.momentums[keras_hooks.variable_index(self, variable)]
        if keras.backend.backend() == "tensorflow":
            return self._fused_step(gradient, variable, buffer, learning_rate)
        momentum = ops.cast(self.momentum, buffer.dtype) * ops.cast(
            self._momentum_correction(learning_rate), buffer.dtype
        )
        step = ops.cast(gradient, buffer.dtype) * ops.cast(learning_rate, buffer.dtype)
        self.assign(buffer, buffer * momentum - step)
        self.assign_add(variable, buffer * ops.cast(self.momentum, buffer.dtype) - step if self.nesterov else buffer)

    def _fused_step(self, gradient: Tensor, variable: Any, buffer: keras.Variable, learning_rate: Tensor) -> None:
        """The same as one operation, where the plain ones pass over weights and buffer five times."""
        import tensorflow as tf

        def of(value):
            return tf.cast(value, variable.dtype)

        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=buffer.value.handle,
            lr=of(learning_rate),
            grad=of(gradient),
            momentum=of(self.momentum) * of(self._momentum_correction(learning_rate)),
            use_nesterov=self.nesterov,
        )

    def _momentum_correction(self, rate: Tensor) -> Tensor:
        """The new learning rate divided by the last one where it jumps, else 1."""
        rate, last = ops.cast(rate, "float32"), ops.cast(self.last_rate, "float32")
        change = rate / ops.where(last > 0, last, 1.0)
        jumps = (last > 0) & (ops.maximum(change, 1.0 / ops.maximum(change, 1e-12)) > RATE_JUMP)
        return ops.where(jumps, change, 1.0)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "l2": self.l2, "bias_rate": self.bias_rate}


@keras.saving.register_keras_serializable("retinanet_keras", name="AdamW")  # the name in files
class KernelAdamW(keras.optimizers.AdamW):
    """AdamW that decays kernels only; its step is one operation on TensorFlow, where Keras's has a dozen.

    It is a class of its own because Keras does not save with a model which variables are excluded from the decay.

    Args:
        learning_rate: float or LearningRateSchedule.
        weight_decay: float.
        name: str. Name of the optimizer.
        **kwargs: Further arguments of `keras.optimizers.AdamW`.
    """

    def __init__(
        self, learning_rate: Rate = 0.001, weight_decay: float = 0.004, name: str = "AdamW", **kwargs: Any
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, name=name, **kwargs)
        self.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        if keras.backend.backend() != "tensorflow" or self.amsgrad:
            return super().update_step(gradient, variable, learning_rate)
        import tensorflow as tf

        def of(value):
            return tf.cast(value, variable.dtype)

        mean, square = keras_hooks.adam_moments(self, variable)
        step = of(self.iterations + 1)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=mean.value.handle,
            v=square.value.handle,
            beta1_power=of(self.beta_1) ** step,
            beta2_power=of(self.beta_2) ** step,
            lr=of(learning_rate),
            beta1=of(self.beta_1),
            beta2=of(self.beta_2),
            epsilon=of(self.epsilon),
            grad=of(gradient),
        )


@keras.saving.register_keras_serializable("retinanet_keras")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from a third of the rate (Detectron), then steps (§4.1) or a cosine to zero.

    Args:
        rate: float. Learning rate after warm-up.
        iterations: int. Steps in all; where the cosine ends.
        warmup: int. Steps of warm-up.
        drops: sequence of ints, or None. Steps at which the rate is divided by 10; None: the cosine.
    """

    def __init__(
        self, rate: float, iterations: int, warmup: int = 500, drops: Sequence[int] | None = (60_000, 80_000)
    ) -> None:
        self.rate, self.iterations, self.warmup = rate, iterations, warmup
        self.drops = None if drops is None else tuple(drops)

    def __call__(self, step: Tensor) -> Tensor:
        step = ops.cast(step, "float32")
        if self.drops is None:
            progress = ops.clip((step - self.warmup) / max(1, self.iterations - self.warmup), 0.0, 1.0)
            rate = self.rate * 0.5 * (1.0 + ops.cos(math.pi * progress))
        else:
            passed = sum(ops.cast(step >= drop, "float32") for drop in self.drops)
            rate = self.rate * ops.power(0.1, passed)
        if not self.warmup:
            return rate
        return rate * ops.minimum(1.0, 1.0 / 3.0 + 2.0 / 3.0 * step / self.warmup)

    def get_config(self) -> dict[str, Any]:
        return {"rate": self.rate, "iterations": self.iterations, "warmup": self.warmup, "drops": self.drops}


def build(train: TrainConfig) -> keras.optimizers.Optimizer:
    """The optimizer of a TrainConfig, its learning rate by the linear scaling rule where that applies."""
    drops = None if train.schedule == "cosine" else train.drops
    schedule = Schedule(train.scaled_rate, train.iterations, train.warmup, drops)
    if train.optimizer == "adamw":
        return KernelAdamW(schedule, weight_decay=train.weight_decay, global_clipnorm=train.clip_norm)
    return CoupledSGD(
        schedule,
        momentum=train.momentum,
        l2=train.weight_decay,
        bias_rate=train.bias_rate,
        global_clipnorm=train.clip_norm,
    )
