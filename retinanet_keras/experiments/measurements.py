"""Measured results of a table, as numbers, next to the paper's."""

from __future__ import annotations

import dataclasses
import logging
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retinanet_keras.config import TrainConfig
from retinanet_keras.errors import DataError
from retinanet_keras.evaluation import coco_json
from retinanet_keras.experiments import paper, tables
from retinanet_keras.storage import strict_json
from retinanet_keras.training import log_file

logger = logging.getLogger("retinanet_keras")
FIRST = "r50_400"  # row of Table 1e that times are relative to
Results = dict[int, dict[str, Any]]  # result by seed


def percent(value: float | None) -> str:
    """Format a fraction as the paper does, in percent; None as a dash."""
    return "-" if value is None else f"{100 * value:.1f}"


def results(place: Path) -> dict[str, Results]:
    """Read {row: {seed: result.json, with the losses logged}} of a table's folder; damaged files are skipped."""
    by_row: dict[str, Results] = {}
    for file in sorted(place.glob("*/*/result.json")):
        result = read_result(file)
        if result is None:
            logger.warning("%s is damaged, so the table does not include it. Run that row again", file)
        elif file.parts[-2].isdecimal():
            rows, _ = log_file.read(file.with_name("log.csv"))
            losses = [(int(row["step"]), row["loss"]) for row in rows if "loss" in row]
            by_row.setdefault(file.parts[-3], {})[int(file.parts[-2])] = {**result, "losses": losses}
    return by_row


def read_result(file: Path) -> dict[str, Any] | None:
    """Read a result.json: {"AP", ...} in 0..1 or None, or {"diverged": the step}; None where it is damaged."""
    try:
        tree = strict_json.read(file)
    except strict_json.JsonError:
        return None
    if not isinstance(tree, dict):
        return None
    if type(tree.get("diverged")) is int:
        return tree
    valid = all(key in tree and (tree[key] is None or coco_json.finite(tree[key])) for key in paper.METRICS)
    return tree if valid else None


def read_ap(file: Path) -> float | None:
    """Read AP in 0..1, or None, from an evaluation's metrics.json; a DataError where it cannot be read."""
    tree = coco_json.read_json(file)
    ap: Any = tree.get("AP", "") if isinstance(tree, dict) else ""
    if ap is None or coco_json.finite(ap):
        return ap
    raise DataError(f"{file}: expected an object with AP, a number or null. Evaluate the run again")


def mean_ap(seeds: Results) -> float | None:
    """Return the mean AP in percent of {seed: result}; None where no seed has one."""
    return _mean([100 * one["AP"] for one in seeds.values() if one.get("AP") is not None])


def read_times(place: Path) -> dict[str, Any] | None:
    """Read the time.json that `timing.measure` wrote to a table's folder; None where there is none."""
    file = place / "time.json"
    if not file.exists():
        return None
    tree = coco_json.read_json(file)
    rows = tree.get("rows") if isinstance(tree, dict) else None
    if not isinstance(rows, dict) or not all(map(coco_json.finite, rows.values())):
        raise DataError(f"{file}: expected an object with `rows`, milliseconds by name. Measure again with --time")
    return tree


def lines(place: Path, table: str, scale: str) -> list[dict[str, Any]]:
    """Return the table: a dict for each row of this scale, and for rows that the paper took from others.

    Measured columns are means over the seeds that did not diverge, in percent; `difference` is that of AP to the
    baseline row; `time` is in milliseconds, and `relative_time` relative to the first row.
    """
    measured, printed_rows = results(place), paper.rows(table)
    milliseconds = (read_times(place) or {"rows": {}})["rows"]
    trained = {row.name: row for row in tables.rows(table, scale) if row.group != "search" or row.name in measured}
    means = {name: mean_ap(measured.get(name, {})) for name in trained}
    rows = []
    for name in trained if table == "text" else printed_rows:
        theirs = printed_rows.get(name, {})
        if name not in trained:
            changes = f"not trained here: {theirs['method']}, {theirs['backbone']}"
            rows.append({"row": name, "changes": changes, **_of_paper(theirs)})
            continue
        against = tables.baseline(table, trained[name], scale)
        than = trained.get(against) if against != name else None
        row: dict[str, Any] = {"row": name}
        row |= {"changes": tables.differs(trained[name], scale, than), "baseline": against}
        row |= _measured(measured.get(name, {}))
        ap, baseline_ap = means[name], means.get(against)
        if ap is not None and baseline_ap is not None:
            row["difference"] = ap - baseline_ap
        row |= _of_paper(theirs, printed_rows.get(against, {}))
        row |= _times(name, milliseconds, printed_rows)
        rows.append(row)
    return rows


def _measured(seeds: Results) -> dict[str, Any]:
    """Columns of one row from its results by seed."""
    done = [one for one in seeds.values() if "diverged" not in one]
    row: dict[str, Any] = {"seeds": len(seeds)}
    for key in paper.METRICS:
        row[key] = _mean([100 * one[key] for one in done if one[key] is not None])
    values = [100 * one["AP"] for one in done if one["AP"] is not None]
    row["AP_deviation"] = statistics.stdev(values) if len(values) > 1 else None
    row["AP_of_seeds"] = " ".join(percent(one.get("AP")) for one in seeds.values())
    steps = [one["diverged"] for one in seeds.values() if "diverged" in one]
    row["diverged"] = len(steps)
    row["diverged_in_steps"] = " ".join(map(str, steps))
    curves = [[loss for _, loss in one["losses"]] for one in seeds.values() if one["losses"]]
    row["loss_first"] = _mean([losses[0] for losses in curves])
    row["loss_highest"] = _mean([max(losses) for losses in curves])
    row["loss_last"] = _mean([losses[-1] for losses in curves])
    return row


def _of_paper(theirs: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Columns of the paper's numbers."""
    row = {f"paper_{key}": theirs.get(key) for key in (*paper.METRICS, "time") if key in theirs}
    row["paper_difference"] = theirs.get("difference")
    if row["paper_difference"] is None and baseline and None not in (theirs.get("AP"), baseline.get("AP")):
        row["paper_difference"] = theirs["AP"] - baseline["AP"]
    return {**row, "paper_words": theirs.get("words")}


def _times(name: str, milliseconds: Mapping[str, float], printed_rows: Mapping[str, Any]) -> dict[str, float]:
    """Columns of the time, measured and the paper's."""
    theirs = {key: row.get("time") for key, row in printed_rows.items()}
    row = {}
    for prefix, times in (("", milliseconds), ("paper_", theirs)):
        if times.get(name):
            row[f"{prefix}time"] = times[name]
            if times.get(FIRST):
                row[f"{prefix}relative_time"] = times[name] / times[FIRST]
    return row


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def budgets(place: Path) -> list[str]:
    """Describe how long the rows in a folder were trained, without repetitions."""
    trees = [coco_json.read_json(file) for file in sorted(place.glob("*/config.json"))]
    trains = [tree.get("train", {}) if isinstance(tree, dict) else {} for tree in trees]
    full = [
        dataclasses.replace(TrainConfig(), **{k: train[k] for k in ("iterations", "batch_size") if k in train})
        for train in trains
    ]
    return list(dict.fromkeys(f"{train.iterations:,} iterations of {train.batch_size} images" for train in full))


def best_alphas(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Describe "the best alpha for each gamma" (§5.1) among the finished rows of the search."""
    best: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        match = re.fullmatch(r"gamma_(.+)_alpha_(.+)", row["row"])
        if match and row.get("AP") is not None:
            best.setdefault(match[1], []).append((row["AP"], match[2]))
    theirs = {f"{row['gamma']:g}": row["alpha"] for row in paper.rows("1b").values()}
    return [
        f"gamma {gamma}: of {len(tried)} alphas the best is {max(tried)[1]}, AP {max(tried)[0]:.1f}; "
        f"the paper's is {theirs[gamma]:g}\n"
        for gamma, tried in best.items()
    ]
