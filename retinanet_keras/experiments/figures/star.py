"""Figure 7: for which gamma and beta FL* is effective, from runs that differ only in these (Appendix A).

The paper calls a setting effective where the model converged with an AP above 33.5, and FL has 34.0; here, where the AP
is at least that fraction of the AP of FL in the same training. The grid is this project's: the paper only plots its.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from retinanet_keras.config import load_config
from retinanet_keras.errors import UserError
from retinanet_keras.experiments import measurements, paper
from retinanet_keras.experiments.figures import loss_curves, sheet

GAMMAS = (1.0, 2.0, 4.0)
BETAS = (-2.0, -1.0, 0.0, 1.0, 2.0)
EFFECTIVE = paper.rows("figure7")["effective"]["AP"] / paper.rows("3")["fl"]["AP"]
BASELINE = "focal"  # the run of FL
ALPHA = 0.25  # Appendix A: in all experiments
COLUMNS = ("run", "gamma", "beta", "state", "AP")


def settings() -> dict[str, tuple[float, float] | None]:
    """Return the runs: {name: (gamma, beta) or None for the baseline}."""
    grid = {f"g{gamma:g}_b{beta:g}": (gamma, beta) for gamma in GAMMAS for beta in BETAS}
    return {BASELINE: None, **grid}


def overrides(name: str) -> list[str]:
    """Return the overrides of the configuration in a run."""
    setting = settings()[name]
    if setting is None:
        return ["loss.kind=focal", f"loss.alpha={ALPHA}", "loss.gamma=2.0"]
    return ["loss.kind=focal_star", f"loss.alpha={ALPHA}", f"loss.gamma={setting[0]}", f"loss.star_beta={setting[1]}"]


def command(name: str, folder: str | Path, config: str | Path, changes: Sequence[str] = ()) -> str:
    """Return the command line that trains a run."""
    words = ["python", "train.py", "--config", str(config), "--workdir", str(Path(folder) / name), "--set"]
    return shlex.join([*words, *overrides(name), *changes])


def states(folder: str | Path) -> dict[str, tuple[str, float | None]]:
    """Return {name: (state, AP or None)}: "effective", "not effective", "diverged", "not run".

    A run that has not finished counts as not run; one that stopped at a step that was not finite has diverged.
    """
    aps = {}
    for name in settings():
        run = Path(folder) / name
        files = sorted(run.glob("eval/*/metrics.json"))
        if len(files) > 1:
            raise UserError(f"{run} was evaluated on several splits. Delete all but one of {[str(f) for f in files]}")
        diverged = not files and any(run.glob("failed/*.npz"))
        ap = (measurements.read_ap(files[0]) or 0.0) if files else None
        aps[name] = ap, diverged
    baseline = aps[BASELINE][0]

    def state(ap: float | None, diverged: bool) -> str:
        if ap is None:
            return "diverged" if diverged else "not run"
        if baseline is None:
            return "not compared"
        return "effective" if ap > 0 and ap >= EFFECTIVE * baseline - 1e-9 else "not effective"

    return {name: (state(*known), known[0]) for name, known in aps.items()}


def figure7(to: str | Path, folder: str | Path, config: str | Path, changes: Sequence[str] = ()) -> Path:
    """Draw Figure 7 of the runs in a folder, and print the commands of missing ones.

    Args:
        to: str or Path. Folder to write to.
        folder: str or Path. Folder of the runs, each named as in `settings`; it need not exist.
        config: str or Path. Configuration that all runs share.
        changes: sequence of str. Overrides that all runs share.
    """
    for name in settings():
        load_config(config, [*overrides(name), *changes])  # reports errors before anything is trained
    known = states(folder)
    figure = _draw(known)
    rows = [[name, *(setting or ("", "")), *known[name]] for name, setting in settings().items()]
    path = sheet.save(to, "figure7", figure, COLUMNS, rows)
    missing = [name for name, (state, _) in known.items() if state == "not run"]
    if missing:
        print(f"\n{len(missing)} of {len(known)} runs are missing:")
        print("\n".join(command(name, folder, config, changes) for name in missing))
    return path


def _draw(known: Mapping[str, tuple[str, float | None]]) -> Figure:
    looks = {
        "effective": (sheet.BLUE, "-", 1.8),
        "not effective": (sheet.RED, "--", 1.4),
        "diverged": (sheet.BLACK, ":", 1.4),
        "not compared": (sheet.GRAY, "-", 1.2),
        "not run": ("#bbbbbb", "-", 0.8),
    }
    figure, axes = sheet.panels(len(GAMMAS), (12.5, 4.3), sharey=True)
    x_t = np.linspace(-loss_curves.REACH, loss_curves.REACH, 301)
    focal = loss_curves.value_and_slope(loss_curves.focal_of(2.0), x_t)[0]
    ap = known[BASELINE][1]
    for axis, gamma in zip(axes, GAMMAS, strict=True):
        axis.axvspan(0, loss_curves.REACH, color="#f2f2f2", zorder=0)
        axis.plot(x_t, focal, color=sheet.ORANGE, linewidth=1.2)
        for beta in BETAS:
            state, _ = known[f"g{gamma:g}_b{beta:g}"]
            color, dash, width = looks[state]
            value = loss_curves.value_and_slope(loss_curves.star_of(gamma, beta), x_t)[0]
            axis.plot(x_t, value, color=color, linestyle=dash, linewidth=width)
        axis.set(xlim=(-loss_curves.REACH, loss_curves.REACH), ylim=(0, 7.2), xlabel="x$_t$")
        words = [f"β = {beta:g}: {_describe(*known[f'g{gamma:g}_b{beta:g}'])}" for beta in BETAS]
        axis.text(0.98, 0.97, "\n".join(words), transform=axis.transAxes, ha="right", va="top", fontsize=8.5)
        axis.set_title(f"γ = {gamma:g}, β from {BETAS[0]:g} (top) to {BETAS[-1]:g}", loc="left", fontsize=10)
    axes[0].set_ylabel("FL* (orange: FL, γ = 2)")
    present = {state for state, _ in known.values()}
    for state, (color, dash, width) in looks.items():
        if state in present:
            axes[1].plot([], [], color=color, linestyle=dash, linewidth=width, label=state)
    name = "FL has not run" if ap is None else f"FL: AP {100 * ap:.1f}; effective from {100 * EFFECTIVE * ap:.1f}"
    name += ". The grid of γ and β is this project's, not the paper's"
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, title=name)
    return figure


def _describe(state: str, ap: float | None) -> str:
    return state if ap is None else f"AP {100 * ap:.1f}"
