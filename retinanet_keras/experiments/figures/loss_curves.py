"""Figures 1, 5 and 6: the losses and their derivatives, from `losses` and automatic differentiation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from retinanet_keras import losses
from retinanet_keras.experiments import paper
from retinanet_keras.experiments.figures import sheet

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)  # Figure 1
# (gamma, beta) of Figure 5: Table 3's
STAR = tuple((row["gamma"], row["beta"]) for row in paper.rows("3").values() if row["beta"] is not None)
REACH = 5.0  # range of x_t in Figures 5 and 6
Loss = Callable[[Any, Any], Any]  # (logits, targets) to losses


def focal_of(gamma: float) -> Loss:
    """Return the focal loss without alpha, as a function of (logits, targets)."""
    return functools.partial(losses.focal, alpha=None, gamma=gamma)


def star_of(gamma: float, beta: float) -> Loss:
    """Return FL* without alpha, as a function of (logits, targets)."""
    return functools.partial(losses.focal_star, alpha=None, gamma=gamma, beta=beta)


def value_and_slope(loss: Loss, x_t: npt.NDArray[np.float64]) -> tuple[npt.NDArray, npt.NDArray]:
    """Return a loss and its derivative by x_t, float64 [N] each, at float64 x_t [N]: with y = 1 the logit is x_t."""
    x = tf.constant(x_t, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = loss(x, tf.ones_like(x))
    return value.numpy(), tape.gradient(value, x).numpy()


def figure1(to: str | Path) -> Path:
    """Draw Figure 1: FL against p_t for gamma of 0 to 5."""
    p_t = np.linspace(0, 1, 501)[1:-1]
    x_t = np.log(p_t) - np.log1p(-p_t)
    values = [value_and_slope(focal_of(gamma), x_t)[0] for gamma in GAMMAS]
    figure, (axis,) = sheet.panels()
    axis.axvspan(0.5, 1, color="#f2f2f2", zorder=0)
    axis.text(0.75, 0.62, "well-classified\nexamples", transform=axis.transAxes, ha="center", color=sheet.GRAY)
    colors = (sheet.BLUE, sheet.ORANGE, sheet.GREEN, sheet.PINK, sheet.RED)
    for gamma, value, color, dash in zip(GAMMAS, values, colors, ("-", "--", "-.", "-", ":"), strict=True):
        name = f"γ = {gamma:g}" + (" (cross entropy)" if gamma == 0 else "")
        axis.plot(p_t, value, color=color, linestyle=dash, linewidth=1.8, label=name)
    axis.set(xlim=(0, 1), ylim=(0, 5), xlabel="probability of the true class, p$_t$", ylabel="loss")
    axis.set_title("FL(p$_t$) = −(1 − p$_t$)$^γ$ log(p$_t$)", loc="left", fontsize=10)
    sheet.legend(axis, loc="upper right")
    columns = ["p_t", *(f"FL gamma={gamma:g}" for gamma in GAMMAS)]
    return sheet.save(to, "figure1", figure, columns, np.stack([p_t, *values], axis=1))


def _family() -> list[tuple[str, str, Loss, str, str]]:
    """[(name, plain name, function, color, line)] of Figures 5 and 6."""
    star = [
        (f"FL*, γ = {gamma:g}, β = {beta:g}", f"FL* gamma={gamma:g} beta={beta:g}", star_of(gamma, beta))
        for gamma, beta in STAR
    ]
    named = [("CE", "CE", losses.cross_entropy), ("FL, γ = 2", "FL gamma=2", focal_of(2.0)), *star]
    colors = (sheet.BLUE, sheet.PINK, sheet.GREEN, sheet.ORANGE)
    return [(*one, *look) for one, look in zip(named, zip(colors, ("-", "-", "--", "-."), strict=True), strict=True)]


def figure5(to: str | Path) -> Path:
    """Draw Figure 5: CE, FL and two settings of FL* against x_t."""
    return _against_x(to, "figure5", 0, "loss", "The losses against x$_t$ = yx")


def figure6(to: str | Path) -> Path:
    """Draw Figure 6: the derivatives by x of Figure 5's losses against x_t, for y = 1."""
    return _against_x(to, "figure6", 1, "derivative by x, for y = 1", "Appendix B: derivatives of the losses")


def _against_x(to: str | Path, name: str, which: int, ylabel: str, title: str) -> Path:
    """Draw losses (`which` 0) or derivatives (1) against x_t."""
    x_t = np.linspace(-REACH, REACH, 501)
    family = _family()
    values = [value_and_slope(loss, x_t)[which] for _, _, loss, _, _ in family]
    figure, (axis,) = sheet.panels()
    axis.axvspan(0, REACH, color="#f2f2f2", zorder=0)
    for (label, _, _, color, dash), value in zip(family, values, strict=True):
        axis.plot(x_t, value, color=color, linestyle=dash, linewidth=1.8, label=label)
    axis.text(0.75, 0.4, "well-classified\nexamples", transform=axis.transAxes, ha="center", color=sheet.GRAY)
    axis.set(xlim=(-REACH, REACH), xlabel="x$_t$ = yx", ylabel=ylabel)
    axis.set_title(title, loc="left", fontsize=10)
    sheet.legend(axis, loc="upper right" if which == 0 else "lower right")
    columns = ["x_t", *(plain for _, plain, *_ in family)]
    return sheet.save(to, name, figure, columns, np.stack([x_t, *values], axis=1))
