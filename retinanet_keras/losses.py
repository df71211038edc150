"""§3, the focal loss and its family, on logits, element by element; and smooth L1 of the box subnet.

With y = +1 or -1 the class, x the logit, p_t the probability of the true class, x_t = y * x, so p_t = sigmoid(x_t)
(Appendix A). Functions return unreduced values: reduction and normalization happen once, in the train step. Each loss
on logits has the derivative of Appendix B in closed form, so that nothing but logits and targets is kept for the
backward pass, and is finite in value and derivative wherever the logit is. The classes at the end are the same losses
as `keras.losses.Loss` objects, for any Keras model.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, ParamSpec

import keras
import numpy as np
from keras import ops

from retinanet_keras.tensors import Tensor

P = ParamSpec("P")


def _with_derivative(derivative: Callable[..., Tensor]) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Give a loss of (logits, targets, alpha, ...) its derivative in closed form, and float32 arguments.

    Args:
        derivative: function of (x_t, ...) with the loss's further settings. The derivative of the loss by x_t, without
            alpha_t: that by x is y * alpha_t times as much.
    """

    def decorate(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
        signature = inspect.signature(loss)

        @functools.wraps(loss)
        def with_derivative(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            settings = dict(bound.arguments)
            logits = _at_least_float32(settings.pop("logits"))
            targets = ops.cast(settings.pop("targets"), logits.dtype)
            alpha = settings.pop("alpha")

            @ops.custom_gradient
            def value(logits: Tensor, targets: Tensor) -> Any:
                def gradient(*args: Tensor, upstream: Tensor = None) -> tuple[Tensor, Tensor]:
                    upstream = args[0] if upstream is None else upstream  # PyTorch's comes by name
                    scale = _y(targets) * _alpha_t(targets, alpha)
                    return upstream * scale * derivative(_x_t(logits, targets), **settings), ops.zeros_like(targets)

                return loss(logits, targets, alpha, **settings), gradient  # type: ignore[call-arg]

            return value(logits, targets)

        return with_derivative

    return decorate


def _cross_entropy_derivative(x_t: Tensor) -> Tensor:
    """p_t - 1, without its cancellation."""
    return -ops.sigmoid(-x_t)


@_with_derivative(_cross_entropy_derivative)
def cross_entropy(logits: Tensor, targets: Tensor, alpha: float | None = None) -> Tensor:
    """CE(p_t) = -alpha_t log(p_t), §3 and §3.1. By x, Appendix B: y (p_t - 1), times alpha_t.

    Args:
        logits: float tensor of any shape.
        targets: tensor of 0 and 1, of the logits' shape or broadcasting to it. No gradient flows to them.
        alpha: float or None. Weight of class 1, 1 - alpha that of class 0; None: both weights are 1.

    Returns:
        float32 tensor of the logits' shape (float64 for float64 logits).
    """
    return _alpha_t(targets, alpha) * -ops.log_sigmoid(_x_t(logits, targets))


def _focal_derivative(x_t: Tensor, gamma: float) -> Tensor:
    """(1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1)."""
    return _focal_factor(x_t, gamma) * (gamma * ops.sigmoid(x_t) * ops.log_sigmoid(x_t) - ops.sigmoid(-x_t))


@_with_derivative(_focal_derivative)
def focal(logits: Tensor, targets: Tensor, alpha: float | None = 0.25, gamma: float = 2.0) -> Tensor:
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t), §3.2.

    By x, Appendix B: y (1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1), times alpha_t.

    Args:
        logits: float tensor of any shape.
        targets: tensor of 0 and 1, of the logits' shape or broadcasting to it. No gradient flows to them.
        alpha: float or None. Weight of class 1, 1 - alpha that of class 0; None: both weights are 1.
        gamma: float. Focusing parameter, at least 0.

    Returns:
        float32 tensor of the logits' shape (float64 for float64 logits).
    """
    x_t = _x_t(logits, targets)
    return _alpha_t(targets, alpha) * (-_focal_factor(x_t, gamma) * ops.log_sigmoid(x_t))


def _focal_factor(x_t: Tensor, gamma: float) -> Tensor:
    """(1 - p_t)^gamma as exp(gamma log(1 - p_t)), which is finite wherever the logit is, also for gamma below 1."""
    return ops.exp(gamma * ops.log_sigmoid(-x_t))


def _focal_star_derivative(x_t: Tensor, gamma: float, beta: float) -> Tensor:
    """p*_t - 1, without its cancellation."""
    return -ops.sigmoid(-(gamma * x_t + beta))


@_with_derivative(_focal_star_derivative)
def focal_star(
    logits: Tensor, targets: Tensor, alpha: float | None = 0.25, gamma: float = 2.0, beta: float = 1.0
) -> Tensor:
    """FL*(p_t) = -alpha_t log(p*_t) / gamma with p*_t = sigmoid(gamma x_t + beta), Appendix A.

    By x, Appendix B: y (p*_t - 1), times alpha_t.

    Args:
        logits: float tensor of any shape.
        targets: tensor of 0 and 1, of the logits' shape or broadcasting to it. No gradient flows to them.
        alpha: float or None. Weight of class 1, 1 - alpha that of class 0; None: both weights are 1.
        gamma: float. Steepness, above 0.
        beta: float. Shift.

    Returns:
        float32 tensor of the logits' shape (float64 for float64 logits).
    """
    return _alpha_t(targets, alpha) * (-ops.log_sigmoid(gamma * _x_t(logits, targets) + beta) / gamma)


def _hinge_derivative(x_t: Tensor, threshold: float) -> Tensor:
    """-p_t (1 - p_t) where p_t is below the threshold, else 0."""
    slope = -ops.sigmoid(x_t) * ops.sigmoid(-x_t)
    return ops.where(_below_threshold(x_t, threshold) < 0, slope, ops.zeros_like(x_t))


@_with_derivative(_hinge_derivative)
def hinge(logits: Tensor, targets: Tensor, alpha: float | None = None, threshold: float = 0.5) -> Tensor:
    """max(0, threshold - p_t), §5.1: "sets loss to 0 above a certain value of p_t". The threshold is not in the paper.

    By x: -y p_t (1 - p_t) where p_t is below the threshold, else 0; times alpha_t.

    Args:
        logits: float tensor of any shape.
        targets: tensor of 0 and 1, of the logits' shape or broadcasting to it. No gradient flows to them.
        alpha: float or None. Weight of class 1, 1 - alpha that of class 0; None: both weights are 1.
        threshold: float. Above 0, at most 1.

    Returns:
        float32 tensor of the logits' shape (float64 for float64 logits).
    """
    x_t = _x_t(logits, targets)
    # threshold - p_t = -threshold (1 - p_t) (exp(x_t - logit(threshold)) - 1), without cancellation
    excess = -threshold * ops.sigmoid(-x_t) * ops.expm1(_below_threshold(x_t, threshold))
    return _alpha_t(targets, alpha) * excess


def _below_threshold(x_t: Tensor, threshold: float) -> Tensor:
    """x_t - logit(threshold) where that is negative, else 0; exact near 0."""
    logit = math.log(threshold / (1 - threshold)) if threshold < 1 else math.inf
    coarse = float(np.float32(logit))
    return -ops.relu((logit - coarse if threshold < 1 else 0.0) - (x_t - coarse))


def smooth_l1(error: Tensor, beta: float = 0.11) -> Tensor:
    """error^2 / (2 beta) where |error| < beta, else |error| - beta / 2; §4.1, from Fast R-CNN.

    Args:
        error: float tensor of any shape. Predicted minus target deltas.
        beta: float. Where it turns linear: Detectron's 0.11, not in the paper; 1 is Fast R-CNN's.

    Returns:
        float32 tensor of the same shape (float64 for float64).
    """
    size = ops.abs(_at_least_float32(error))
    return ops.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)


def _y(targets: Tensor) -> Tensor:
    """y of the paper: 1 for target 1, -1 for target 0."""
    return 2.0 * targets - 1.0


def _x_t(logits: Tensor, targets: Tensor) -> Tensor:
    """x_t = y x of Appendix A, the logit of p_t."""
    return logits * _y(targets)


def _alpha_t(targets: Tensor, alpha: float | None) -> Tensor:
    """alpha for target 1, 1 - alpha for target 0 (§3.1); 1 where alpha is None."""
    return 1.0 if alpha is None else targets * alpha + (1.0 - targets) * (1.0 - alpha)


def _at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32, in which losses are computed and reduced; float64 stays."""
    x = ops.convert_to_tensor(x)
    return x if keras.backend.standardize_dtype(x.dtype) == "float64" else ops.cast(x, "float32")


class ElementLoss(keras.losses.Loss):
    """A function of this module as a Keras loss, called (targets, predictions).

    `sample_weight` may have the predictions' shape, or lack axes at the end. The loss is computed and reduced in
    float32 or above, whatever the mixed precision policy.

    Args:
        function: function of (predictions, targets, **settings). The loss of each element.
        settings: dict. Further arguments of the function, which become attributes and the config.
        reduction: str. As of Keras's losses; "none" returns the elements.
        name: str. Name of the loss.
        dtype: str or None. "float64" computes in float64.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        settings: dict[str, Any],
        reduction: str,
        name: str,
        dtype: str | None = None,
    ) -> None:
        policy = keras.dtype_policies.get(dtype or keras.config.floatx())
        super().__init__(
            name=name, reduction=reduction, dtype="float64" if policy.compute_dtype == "float64" else "float32"
        )
        self.function, self.settings = function, settings
        self.__dict__.update(settings)

    def __call__(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None) -> Tensor:
        if sample_weight is not None:
            sample_weight = ops.convert_to_tensor(sample_weight)
            missing = len(ops.shape(y_pred)) - len(ops.shape(sample_weight))
            sample_weight = ops.reshape(sample_weight, (*ops.shape(sample_weight), *[1] * missing))
        return super().__call__(y_true, y_pred, sample_weight)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return self.function(y_pred, y_true, **self.settings)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.settings}


REDUCTION = "sum_over_batch_size"


@keras.saving.register_keras_serializable("retinanet_keras")
class CrossEntropyLoss(ElementLoss):
    """Cross entropy of logits; with `alpha`, the balanced cross entropy of §3.1.

    Args:
        alpha: float or None. Weight of class 1, 1 - alpha that of class 0; None: both weights are 1.
        reduction: str. "sum_over_batch_size", "sum", "mean", "mean_with_sample_weight" or "none".
        name: str. Name of the loss.
        dtype: str or None. "float64" computes in float64, anything else in float32.

    Example:

    ```python
    import numpy as np

    from retinanet_keras import losses

    loss = losses.CrossEntropyLoss(alpha=0.75)
    value = loss(np.array([[1.0, 0.0]]), np.array([[2.0, -3.0]]))  # of targets and logits
    ```
    """

    def __init__(
        self,
        alpha: float | None = None,
        reduction: str = REDUCTION,
        name: str = "cross_entropy_loss",
        dtype: str | None = None,
    ) -> None:
        super().__init__(cross_entropy, {"alpha": alpha}, reduction, name, dtype)


@keras.saving.register_keras_serializable("retinanet_keras")
class FocalLoss(ElementLoss):
    """Focal loss of logits, §3.2.

    Args:
        alpha: float or None. Weight of class 1, 1 - alpha that of class 0; None: both weights are 1.
        gamma: float. Focusing parameter, at least 0.
        reduction: str. "sum_over_batch_size", "sum", "mean", "mean_with_sample_weight" or "none".
        name: str. Name of the loss.
        dtype: str or None. "float64" computes in float64, anything else in float32.

    Example:

    ```python
    import keras

    from retinanet_keras import losses

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])  # logits of 3 classes
    model.compile(optimizer="sgd", loss=losses.FocalLoss(gamma=1.0))
    ```
    """

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        reduction: str = REDUCTION,
        name: str = "focal_loss",
        dtype: str | None = None,
    ) -> None:
        super().__init__(focal, {"alpha": alpha, "gamma": gamma}, reduction, name, dtype)


@keras.saving.register_keras_serializable("retinanet_keras")
class FocalStarLoss(ElementLoss):
    """FL* of logits, Appendix A.

    Args:
        alpha: float or None. Weight of class 1, 1 - alpha that of class 0; None: both weights are 1.
        gamma: float. Steepness, above 0.
        beta: float. Shift.
        reduction: str. "sum_over_batch_size", "sum", "mean", "mean_with_sample_weight" or "none".
        name: str. Name of the loss.
        dtype: str or None. "float64" computes in float64, anything else in float32.

    Example:

    ```python
    import numpy as np

    from retinanet_keras import losses

    loss = losses.FocalStarLoss(gamma=2.0, beta=1.0)
    value = loss(np.array([[1.0, 0.0]]), np.array([[2.0, -3.0]]))  # of targets and logits
    ```
    """

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        beta: float = 1.0,
        reduction: str = REDUCTION,
        name: str = "focal_star_loss",
        dtype: str | None = None,
    ) -> None:
        super().__init__(focal_star, {"alpha": alpha, "gamma": gamma, "beta": beta}, reduction, name, dtype)


@keras.saving.register_keras_serializable("retinanet_keras")
class HingeLoss(ElementLoss):
    """Hinge loss of the probability of the true class, from logits, §5.1.

    Args:
        alpha: float or None. Weight of class 1, 1 - alpha that of class 0; None: both weights are 1.
        threshold: float. Probability from which the loss is 0; above 0, at most 1.
        reduction: str. "sum_over_batch_size", "sum", "mean", "mean_with_sample_weight" or "none".
        name: str. Name of the loss.
        dtype: str or None. "float64" computes in float64, anything else in float32.

    Example:

    ```python
    import numpy as np

    from retinanet_keras import losses

    loss = losses.HingeLoss(threshold=0.5)
    value = loss(np.array([[1.0, 0.0]]), np.array([[2.0, -3.0]]))  # of targets and logits
    ```
    """

    def __init__(
        self,
        alpha: float | None = None,
        threshold: float = 0.5,
        reduction: str = REDUCTION,
        name: str = "hinge_loss",
        dtype: str | None = None,
    ) -> None:
        super().__init__(hinge, {"alpha": alpha, "threshold": threshold}, reduction, name, dtype)


@keras.saving.register_keras_serializable("retinanet_keras")
class SmoothL1Loss(ElementLoss):
    """Smooth L1 loss of deltas, §4.1.

    Args:
        beta: float. Where it turns linear: Detectron's 0.11, not in the paper.
        reduction: str. "sum_over_batch_size", "sum", "mean", "mean_with_sample_weight" or "none".
        name: str. Name of the loss.
        dtype: str or None. "float64" computes in float64, anything else in float32.

    Example:

    ```python
    import numpy as np

    from retinanet_keras import losses

    loss = losses.SmoothL1Loss(beta=1.0)
    value = loss(np.array([[1.0, 0.0]]), np.array([[2.0, -3.0]]))  # of targets and predictions
    ```
    """

    def __init__(
        self, beta: float = 0.11, reduction: str = REDUCTION, name: str = "smooth_l1_loss", dtype: str | None = None
    ) -> None:
        super().__init__(smooth_l1, {"beta": beta}, reduction, name, dtype)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return smooth_l1(y_pred - y_true, self.beta)


LOSS_OF: dict[Callable, type] = {
    cross_entropy: CrossEntropyLoss,
    focal: FocalLoss,
    focal_star: FocalStarLoss,
    hinge: HingeLoss,
    smooth_l1: SmoothL1Loss,
}


def get(loss: Any) -> Any:
    """The Keras loss of a name, function or object; a function of this module becomes its class with its defaults.

    Args:
        loss: str, function, keras.losses.Loss or None. None returns None.
    """
    return LOSS_OF[loss]() if callable(loss) and loss in LOSS_OF else keras.losses.get(loss)
