"""§3, the focal loss and its family, on logits, element by element; and smooth L1 of the box subnet.

With y = +1 or -1 the class, x the logit, p_t the probability of the true class, x_t = y * x, so p_t = sigmoid(x_t)
(Appendix A). Functions return unreduced values: reduction and normalization happen once, where the step is. Each has
the derivative of Appendix B in closed form, so that nothing but logits and targets is kept for the backward pass, and
is finite in value and derivative wherever the logit is. The classes at the end are the same losses as
`keras.losses.Loss` objects, for any Keras model.
"""

import math
from collections.abc import Callable

import keras
import numpy as np
from keras import ops


def cross_entropy(logits, targets, alpha=None):
    """CE(p_t) = -alpha_t log(p_t), §3 and §3.1. By x, Appendix B: y (p_t - 1), times alpha_t.

    Args:
        logits: any shape, any float type.
        targets: 0. or 1., of the logits' shape or broadcasting to it; no gradient flows to them.
        alpha: weight of class 1, 1 - alpha that of class 0; None leaves it out.

    Returns:
        float32 of the logits' shape (float64 for float64 logits).
    """
    return _on_true_logit(
        lambda x_t: -ops.log_sigmoid(x_t),
        lambda x_t: -ops.sigmoid(-x_t),  # p_t - 1 without its cancellation
        logits, targets, alpha,
    )  # fmt: skip


def focal(logits, targets, alpha=0.25, gamma=2.0):
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t), §3.2.

    By x, Appendix B: y (1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1), times alpha_t. The power is taken as
    exp(gamma log(1 - p_t)), which is finite wherever the logit is, for gamma under 1 too.

    Args and returns as `cross_entropy`; gamma: focusing parameter, at least 0.
    """

    def power(x_t):
        return ops.exp(gamma * ops.log_sigmoid(-x_t))  # (1 - p_t)^gamma

    return _on_true_logit(
        lambda x_t: -power(x_t) * ops.log_sigmoid(x_t),
        lambda x_t: power(x_t) * (gamma * ops.sigmoid(x_t) * ops.log_sigmoid(x_t) - ops.sigmoid(-x_t)),
        logits, targets, alpha,
    )  # fmt: skip


def focal_star(logits, targets, alpha=0.25, gamma=2.0, beta=1.0):
    """FL*(p_t) = -alpha_t log(p*_t) / gamma with p*_t = sigmoid(gamma x_t + beta), Appendix A.

    By x, Appendix B: y (p*_t - 1), times alpha_t.

    Args and returns as `cross_entropy`; gamma: steepness, above 0; beta: shift.
    """
    return _on_true_logit(
        lambda x_t: -ops.log_sigmoid(gamma * x_t + beta) / gamma,
        lambda x_t: -ops.sigmoid(-(gamma * x_t + beta)),
        logits, targets, alpha,
    )  # fmt: skip


def hinge(logits, targets, alpha=None, threshold=0.5):
    """max(0, threshold - p_t), §5.1: "sets loss to 0 above a certain value of p_t". The threshold is this project's.

    By x: -y p_t (1 - p_t) where p_t is under the threshold, else 0; times alpha_t.

    Args and returns as `cross_entropy`; threshold: above 0, at most 1.
    """
    logit = math.log(threshold / (1 - threshold)) if threshold < 1 else math.inf  # where the loss ends
    coarse = float(np.float32(logit))

    def beyond(x_t):  # x_t - logit where that is negative, else 0; exact near 0
        return -ops.relu((logit - coarse if threshold < 1 else 0.0) - (x_t - coarse))

    return _on_true_logit(
        lambda x_t: -threshold * ops.sigmoid(-x_t) * ops.expm1(beyond(x_t)),  # threshold - p_t, no cancellation
        lambda x_t: ops.where(beyond(x_t) < 0, -ops.sigmoid(x_t) * ops.sigmoid(-x_t), ops.zeros_like(x_t)),
        logits, targets, alpha,
    )  # fmt: skip


def smooth_l1(error, beta=0.11):
    """error^2 / (2 beta) where |error| < beta, else |error| - beta / 2; §4.1, from Fast R-CNN.

    Args:
        error: predicted minus target deltas, any shape.
        beta: where it turns linear. Detectron's 0.11; 1 is Fast R-CNN's. Not in the paper.

    Returns:
        float32 of the same shape (float64 for float64).
    """
    size = ops.abs(_at_least_float32(error))
    return ops.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)


def _on_true_logit(value, slope, logits, targets, alpha):
    """alpha_t * value(x_t), whose derivative by the logit is y * alpha_t * slope(x_t), nothing kept in between."""
    logits = _at_least_float32(logits)
    targets = ops.cast(targets, logits.dtype)

    @ops.custom_gradient
    def loss(logits, targets):
        def sign():
            return 2.0 * targets - 1.0  # y

        def weight():
            return 1.0 if alpha is None else targets * alpha + (1.0 - targets) * (1.0 - alpha)  # alpha_t

        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream  # PyTorch's comes by name
            return upstream * (sign() * weight()) * slope(logits * sign()), ops.zeros_like(targets)

        return weight() * value(logits * sign()), gradient

    return loss(logits, targets)


def _at_least_float32(x):
    """Half precision comes up to float32, in which losses are computed and reduced."""
    x = ops.convert_to_tensor(x)
    return x if keras.backend.standardize_dtype(x.dtype) == "float64" else ops.cast(x, "float32")


class ElementLoss(keras.losses.Loss):
    """A function of this module as a Keras loss, called (targets, predictions).

    Reduced as Keras's are ("sum_over_batch_size") unless `reduction` says otherwise; "none" gives the elements. Each
    element counts for itself: `sample_weight` may have the predictions' shape, or lack axes at the end. Computed
    and reduced in float32 or above, whatever the mixed precision policy.
    """

    def __init__(self, function, settings, reduction, name, dtype=None):
        wanted = keras.dtype_policies.get(dtype or keras.config.floatx()).compute_dtype
        super().__init__(name=name, reduction=reduction, dtype="float64" if wanted == "float64" else "float32")
        self.function, self.settings = function, settings
        vars(self).update(settings)

    def __call__(self, y_true, y_pred, sample_weight=None):
        if sample_weight is not None:
            sample_weight = ops.convert_to_tensor(sample_weight)
            missing = len(ops.shape(y_pred)) - len(ops.shape(sample_weight))
            sample_weight = ops.reshape(sample_weight, (*ops.shape(sample_weight), *[1] * missing))
        return super().__call__(y_true, y_pred, sample_weight)

    def call(self, y_true, y_pred):
        return self.function(y_pred, y_true, **self.settings)

    def get_config(self):
        return {**super().get_config(), **self.settings}


REDUCTION = "sum_over_batch_size"


@keras.saving.register_keras_serializable("retinanet_keras")
class CrossEntropyLoss(ElementLoss):
    """`cross_entropy` as a Keras loss on logits; with `alpha`, the balanced one of §3.1."""

    def __init__(self, alpha=None, reduction=REDUCTION, name="cross_entropy_loss", dtype=None):
        super().__init__(cross_entropy, {"alpha": alpha}, reduction, name, dtype)


@keras.saving.register_keras_serializable("retinanet_keras")
class FocalLoss(ElementLoss):
    """`focal` as a Keras loss on logits."""

    def __init__(self, alpha=0.25, gamma=2.0, reduction=REDUCTION, name="focal_loss", dtype=None):
        super().__init__(focal, {"alpha": alpha, "gamma": gamma}, reduction, name, dtype)


@keras.saving.register_keras_serializable("retinanet_keras")
class FocalStarLoss(ElementLoss):
    """`focal_star` as a Keras loss on logits."""

    def __init__(self, alpha=0.25, gamma=2.0, beta=1.0, reduction=REDUCTION, name="focal_star_loss", dtype=None):
        super().__init__(focal_star, {"alpha": alpha, "gamma": gamma, "beta": beta}, reduction, name, dtype)


@keras.saving.register_keras_serializable("retinanet_keras")
class HingeLoss(ElementLoss):
    """`hinge` as a Keras loss on logits."""

    def __init__(self, alpha=None, threshold=0.5, reduction=REDUCTION, name="hinge_loss", dtype=None):
        super().__init__(hinge, {"alpha": alpha, "threshold": threshold}, reduction, name, dtype)


@keras.saving.register_keras_serializable("retinanet_keras")
class SmoothL1Loss(ElementLoss):
    """`smooth_l1` as a Keras loss on deltas."""

    def __init__(self, beta=0.11, reduction=REDUCTION, name="smooth_l1_loss", dtype=None):
        super().__init__(smooth_l1, {"beta": beta}, reduction, name, dtype)

    def call(self, y_true, y_pred):
        return smooth_l1(y_pred - y_true, self.beta)


LOSS_OF: dict[Callable, type] = {
    cross_entropy: CrossEntropyLoss, focal: FocalLoss, focal_star: FocalStarLoss, hinge: HingeLoss,
    smooth_l1: SmoothL1Loss,
}  # fmt: skip


def get(loss):
    """The Keras loss that a name, function or object stands for; a function of this module, with its defaults."""
    return LOSS_OF[loss]() if callable(loss) and loss in LOSS_OF else keras.losses.get(loss)
