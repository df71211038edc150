"""§3, the focal loss and its family, on logits, element by element; and smooth L1 of the box subnet.

With y = +1 or -1 the class, x the logit, p_t the probability of the true class, x_t = y * x, so p_t = sigmoid(x_t)
(Appendix A). Functions take 0/1 targets of the logits' shape (broadcasting is fine) and return unreduced float32
values: reduction and normalisation happen once, where the step is. The classes at the end are the same losses as
`keras.losses.Loss` objects.
"""

import keras
from keras import ops


def cross_entropy(logits, targets, alpha=None):
    """CE(p_t) = -alpha_t log(p_t), §3 and §3.1. The derivative by x, Appendix B: y (p_t - 1), times alpha_t.

    Args:
        logits: any shape.
        targets: 0. or 1., the logits' shape.
        alpha: weight of class 1, 1 - alpha that of class 0; None leaves it out.

    Returns:
        float32 of the logits' shape.
    """
    x_t, weight = _true_logit(logits, targets, alpha)
    return weight * ops.softplus(-x_t)


def focal(logits, targets, alpha=0.25, gamma=2.0):
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t), §3.2.

    The derivative by x, Appendix B: y (1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1), times alpha_t. The power is
    taken as exp(gamma log(1 - p_t)), which is finite in value and gradient wherever p_t is.

    Args and returns as `cross_entropy`; gamma: focusing parameter, at least 0.
    """
    x_t, weight = _true_logit(logits, targets, alpha)
    return weight * ops.exp(-gamma * ops.softplus(x_t)) * ops.softplus(-x_t)


def focal_star(logits, targets, alpha=0.25, gamma=2.0, beta=1.0):
    """FL*(p_t) = -alpha_t log(p*_t) / gamma with p*_t = sigmoid(gamma x_t + beta), Appendix A.

    The derivative by x, Appendix B: y (p*_t - 1), times alpha_t.

    Args and returns as `cross_entropy`; gamma: steepness, above 0; beta: shift.
    """
    x_t, weight = _true_logit(logits, targets, alpha)
    return weight * ops.softplus(-(gamma * x_t + beta)) / gamma


def hinge(logits, targets, alpha=None, threshold=0.5):
    """max(0, threshold - p_t), §5.1: "sets loss to 0 above a certain value of p_t". The threshold is this project's.

    Args and returns as `cross_entropy`.
    """
    x_t, weight = _true_logit(logits, targets, alpha)
    return weight * ops.relu(threshold - ops.sigmoid(x_t))


def smooth_l1(error, beta=0.11):
    """error^2 / (2 beta) where |error| < beta, else |error| - beta / 2; §4.1, from Fast R-CNN.

    Args:
        error: predicted minus target deltas, any shape.
        beta: where it turns linear. Detectron's 0.11; 1 is Fast R-CNN's. Not in the paper.

    Returns:
        float32 of the same shape.
    """
    size = ops.abs(ops.cast(error, "float32"))
    return ops.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)


def _true_logit(logits, targets, alpha):
    """x_t and alpha_t of §3.1, float32."""
    logits = ops.cast(logits, "float32")
    targets = ops.cast(targets, "float32")
    x_t = logits * (2.0 * targets - 1.0)
    weight = 1.0 if alpha is None else targets * alpha + (1.0 - targets) * (1.0 - alpha)
    return x_t, weight


@keras.saving.register_keras_serializable("retinanet_keras")
class FocalLoss(keras.losses.Loss):
    """`focal` as a Keras loss on logits, called (targets, logits); element-wise unless `reduction` is given."""

    def __init__(self, alpha=0.25, gamma=2.0, reduction="none", name="focal_loss", **kwargs):
        super().__init__(name=name, reduction=reduction, **kwargs)
        self.alpha = alpha
        self.gamma = gamma

    def call(self, y_true, y_pred):
        return focal(y_pred, y_true, self.alpha, self.gamma)

    def get_config(self):
        return {**super().get_config(), "alpha": self.alpha, "gamma": self.gamma}


@keras.saving.register_keras_serializable("retinanet_keras")
class SmoothL1Loss(keras.losses.Loss):
    """`smooth_l1` as a Keras loss, called (target deltas, deltas); element-wise unless `reduction` is given."""

    def __init__(self, beta=0.11, reduction="none", name="smooth_l1_loss", **kwargs):
        super().__init__(name=name, reduction=reduction, **kwargs)
        self.beta = beta

    def call(self, y_true, y_pred):
        return smooth_l1(y_pred - y_true, self.beta)

    def get_config(self):
        return {**super().get_config(), "beta": self.beta}
