"""Figure 7: for which gamma and beta FL* works, from runs that differ in nothing else (Appendix A).

The paper calls a setting effective where the model converged with an AP over 33.5, its FL having 34.0; here, where the
AP is at least that part of the AP of FL in the same training. The grid is this project's: the paper's is only drawn.
"""

import shlex
from pathlib import Path

import numpy as np

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


def settings():
    """The declared runs: {name: (gamma, beta) or None for the baseline}."""
    grid = {f"g{gamma:g}_b{beta:g}": (gamma, beta) for gamma in GAMMAS for beta in BETAS}
    return {BASELINE: None, **grid}


def overrides(name):
    """What a run changes in the configuration."""
    setting = settings()[name]
    if setting is None:
        return ["loss.kind=focal", f"loss.alpha={ALPHA}", "loss.gamma=2.0"]
    return ["loss.kind=focal_star", f"loss.alpha={ALPHA}", f"loss.gamma={setting[0]}", f"loss.star_beta={setting[1]}"]


def command(name, folder, config, changes=()):
    """The command line that makes a run."""
    words = ["python", "train.py", "--config", str(config), "--workdir", str(Path(folder) / name), "--set"]
    return shlex.join([*words, *overrides(name), *changes])


def states(folder):
    """{name: (state, AP or None)}: "effective", "not effective", "diverged", "not run".

    A run that is there but not at its end counts as not run; one that stopped at a step that was not finite, diverged.
    """
    aps = {}
    for name in settings():
        run = Path(folder) / name
        found = sorted(run.glob("eval/*/metrics.json"))
        if len(found) > 1:
            raise UserError(f"{run} has been evaluated on several splits; leave one of {[str(f) for f in found]}")
        diverged = not found and any(run.glob("failed/*.npz"))
        ap = (measurements.read_ap(found[0]) or 0.0) if found else None
        aps[name] = ap, diverged
    baseline = aps[BASELINE][0]

    def state(ap, diverged):
        if ap is None:
            return "diverged" if diverged else "not run"
        if baseline is None:
            return "not compared"
        return "effective" if ap > 0 and ap >= EFFECTIVE * baseline - 1e-9 else "not effective"

    return {name: (state(*known), known[0]) for name, known in aps.items()}


def figure7(to, folder, config, changes=()):
    """Figure 7 of the runs in a folder; the commands of those that are missing are printed.

    Args:
        folder: of the runs, each named as in `settings`; it need not exist.
        config: path of the configuration that all runs share.
        changes: overrides that all runs share.
    """
    for name in settings():
        load_config(config, [*overrides(name), *changes])  # says what is wrong before anything is trained
    known = states(folder)
    figure = _draw(known)
    rows = [[name, *(setting or ("", "")), *known[name]] for name, setting in settings().items()]
    path = sheet.save(to, "figure7", figure, COLUMNS, rows)
    missing = [name for name, (state, _) in known.items() if state == "not run"]
    if missing:
        print(f"\n{len(missing)} of {len(known)} runs are missing:")
        print("\n".join(command(name, folder, config, changes) for name in missing))
    return path


def _draw(known):
    looks = {
        "effective": (sheet.BLUE, "-", 1.8), "not effective": (sheet.RED, "--", 1.4),
        "diverged": (sheet.BLACK, ":", 1.4), "not compared": (sheet.GRAY, "-", 1.2), "not run": ("#bbbbbb", "-", 0.8),
    }  # fmt: skip
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
        words = [f"β = {beta:g}: {_told(*known[f'g{gamma:g}_b{beta:g}'])}" for beta in BETAS]
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


def _told(state, ap):
    return state if ap is None else f"AP {100 * ap:.1f}"
