"""What was measured of a table, as numbers, beside what the paper prints."""

import dataclasses
import logging
import re
import statistics

from retinanet_keras.config import TrainConfig
from retinanet_keras.errors import DataError
from retinanet_keras.evaluation import coco_json
from retinanet_keras.experiments import paper, tables
from retinanet_keras.storage import strict_json
from retinanet_keras.training import log_file

logger = logging.getLogger("retinanet_keras")
FIRST = "r50_400"  # of Table 1e: times are told relative to it


def percent(value):
    """0..1 as the paper prints it; None as a dash."""
    return "-" if value is None else f"{100 * value:.1f}"


def results(place):
    """{row: {seed: its result.json, with the losses logged}} of a table's folder; damaged files are skipped."""
    found = {}
    for file in sorted(place.glob("*/*/result.json")):
        result = read_result(file)
        if result is None:
            logger.warning("%s is damaged: the table lacks it. Run that row again", file)
        elif file.parts[-2].isdecimal():
            losses = [(int(row["step"]), row["loss"]) for row in log_file.read(file.with_name("log.csv"))[0]
                      if "loss" in row]  # fmt: skip
            found.setdefault(file.parts[-3], {})[int(file.parts[-2])] = {**result, "losses": losses}
    return found


def read_result(file):
    """A row's result.json: {"AP", ...} in 0..1 or None, or {"diverged": the step}; None where it is damaged."""
    try:
        tree = strict_json.read(file)
    except strict_json.JsonError:
        return None
    if not isinstance(tree, dict):
        return None
    if type(tree.get("diverged")) is int:
        return tree
    known = all(key in tree and (tree[key] is None or coco_json.finite(tree[key])) for key in paper.METRICS)
    return tree if known else None


def read_ap(file):
    """AP in 0..1, or None, of an evaluation's metrics.json; a DataError where it cannot be read."""
    tree = coco_json.read_json(file)
    ap = tree.get("AP", "") if isinstance(tree, dict) else ""
    if ap is None or coco_json.finite(ap):
        return ap
    raise DataError(f"{file}: expected an object with AP, a number or null. Evaluate the run again")


def mean_ap(seeds):
    """The mean AP in percent of {seed: result}, None where no seed has one."""
    return _mean([100 * one["AP"] for one in seeds.values() if one.get("AP") is not None])


def read_times(place):
    """What `timing.measure` wrote to a table's folder; None where it did not."""
    file = place / "time.json"
    if not file.exists():
        return None
    tree = coco_json.read_json(file)
    rows = tree.get("rows") if isinstance(tree, dict) else None
    if not isinstance(rows, dict) or not all(map(coco_json.finite, rows.values())):
        raise DataError(f"{file}: expected an object with `rows`, milliseconds by name. Measure again with --time")
    return tree


def lines(place, table, scale):
    """The table: a dict for each row of this scale, and for what the paper took from others.

    `measured` columns are means over the seeds that did not diverge, in percent; `difference` is AP's to the baseline
    row; time is in milliseconds, and `relative` to the first row.
    """
    found, printed_rows = results(place), paper.rows(table)
    milliseconds = (read_times(place) or {"rows": {}})["rows"]
    own = {row.name: row for row in tables.rows(table, scale) if row.group != "search" or row.name in found}
    means = {name: mean_ap(found.get(name, {})) for name in own}
    rows = []
    for name in own if table == "text" else printed_rows:
        theirs = printed_rows.get(name, {})
        if name not in own:
            changes = f"another's: {theirs['method']}, {theirs['backbone']}"
            rows.append({"row": name, "changes": changes, **_of_paper(theirs)})
            continue
        against = tables.baseline(table, own[name], scale)
        than = own.get(against) if against != name else None
        row = {"row": name, "changes": tables.differs(own[name], scale, than), "baseline": against}
        row |= _measured(found.get(name, {}))
        if means[name] is not None and means.get(against) is not None:
            row["difference"] = means[name] - means[against]
        row |= _of_paper(theirs, printed_rows.get(against, {}))
        row |= _times(name, milliseconds, printed_rows)
        rows.append(row)
    return rows


def _measured(seeds):
    """Columns of one row's results by seed."""
    done = [one for one in seeds.values() if "diverged" not in one]
    row = {"seeds": len(seeds)}
    for key in paper.METRICS:
        row[key] = _mean([100 * one[key] for one in done if one[key] is not None])
    values = [100 * one["AP"] for one in done if one["AP"] is not None]
    row["AP_deviation"] = statistics.stdev(values) if len(values) > 1 else None
    row["AP_of_seeds"] = " ".join(percent(one.get("AP")) for one in seeds.values())
    steps = [one["diverged"] for one in seeds.values() if "diverged" in one]
    row["diverged"] = len(steps)
    row["diverged_in_steps"] = " ".join(map(str, steps))
    for key, pick in (
        ("loss_first", lambda loss: loss[0]),
        ("loss_highest", max),
        ("loss_last", lambda loss: loss[-1]),
    ):
        row[key] = _mean([pick([loss for _, loss in one["losses"]]) for one in seeds.values() if one["losses"]])
    return row


def _of_paper(theirs, baseline=None):
    row = {f"paper_{key}": theirs.get(key) for key in (*paper.METRICS, "time") if key in theirs}
    row["paper_difference"] = theirs.get("difference")
    if row["paper_difference"] is None and baseline and None not in (theirs.get("AP"), baseline.get("AP")):
        row["paper_difference"] = theirs["AP"] - baseline["AP"]
    return {**row, "paper_words": theirs.get("words")}


def _times(name, milliseconds, printed_rows):
    theirs = {key: row.get("time") for key, row in printed_rows.items()}
    row = {}
    for prefix, times in (("", milliseconds), ("paper_", theirs)):
        if times.get(name):
            row[f"{prefix}time"] = times[name]
            if times.get(FIRST):
                row[f"{prefix}relative_time"] = times[name] / times[FIRST]
    return row


def _mean(values):
    return statistics.fmean(values) if values else None


def budgets(place):
    """How long the rows there were trained, each once."""
    trees = [coco_json.read_json(file) for file in sorted(place.glob("*/config.json"))]
    trains = [tree.get("train", {}) if isinstance(tree, dict) else {} for tree in trees]
    full = [dataclasses.replace(TrainConfig(), **{k: train[k] for k in ("iterations", "batch_size") if k in train})
            for train in trains]  # fmt: skip
    return list(dict.fromkeys(f"{train.iterations:,} iterations of {train.batch_size} images" for train in full))


def best_alphas(rows):
    """§5.1: "the best alpha for each gamma", of the rows of the search that are done, as text."""
    best = {}
    for row in rows:
        found = re.fullmatch(r"gamma_(.+)_alpha_(.+)", row["row"])
        if found and row.get("AP") is not None:
            best.setdefault(found[1], []).append((row["AP"], found[2]))
    theirs = {f"{row['gamma']:g}": row["alpha"] for row in paper.rows("1b").values()}
    return [
        f"gamma {gamma}: of {len(tried)} alphas the best is {max(tried)[1]}, AP {max(tried)[0]:.1f}; "
        f"the paper's is {theirs[gamma]:g}\n"
        for gamma, tried in best.items()
    ]
