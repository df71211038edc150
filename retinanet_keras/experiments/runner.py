"""The rows of a table, one training after the other, each a process of its own and a folder of its own.

DIR/data/                       generated images, at small scale
DIR/TABLE/ROW/config.json       what train.py is given
DIR/TABLE/ROW/SEED/             the run's folder (`training.folder`), and in it
    output.txt, result.json     what training said; what the table takes from it, written last
DIR/TABLE/table.{txt,csv,html}  written again after every row
"""

import contextlib
import json
import logging
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from retinanet_keras.config import config_from_dict, load_config
from retinanet_keras.errors import Interrupted, UserError
from retinanet_keras.evaluation import coco_json
from retinanet_keras.experiments import measurements, paper, results_page, tables
from retinanet_keras.storage import disk

logger = logging.getLogger("retinanet_keras")
TRAIN = Path(__file__).parents[2] / "train.py"
NOT_FINITE = re.compile(r"error: The loss or its gradient is not finite in step (\d+)")
LOCK = ".row.lock"
USER_ERROR = 2  # status of a command that ends with a UserError


def run_table(table, scale, to, *, only=(), seeds=1, overrides=()):
    """Train what of a table is not done yet, for the first seed first; write the table after each row.

    A row whose loss becomes NaN or infinite has diverged: that is its result, and it is not trained again.

    Args:
        table: one of `tables.NAMES`.
        scale: "paper" or "small".
        to: folder.
        only: rows and groups; empty: all.
        seeds: how many; 0 is the first.
        overrides: strings `section.key=value` for all rows.

    Raises:
        UserError: where the folder holds other settings, or a training fails for another reason. Earlier rows are kept.
    """
    place = Path(to) / table
    for folder in (place, *place.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--to: {folder} is not a folder, and the experiments need one. Choose another place")
    rows = tables.rows(table, scale, only)
    for row in rows:
        _write_config(place / row.name / "config.json", tables.tree(table, row, scale, Path(to) / "data", overrides))
    with _terminated():
        for seed in range(seeds):
            for number, row in enumerate(rows, 1):
                title = f"{table} {row.name}, seed {seed} ({number} of {len(rows)})"
                result = train_row(place / row.name, seed, title)
                print(f"{title}: {_told(result)}", flush=True)
                results_page.write(place, table, scale)
    print(results_page.write(place, table, scale))


def _write_config(path, tree):
    """Check and write a row's configuration, or a UserError where another one is there."""
    config_from_dict(tree)
    text = json.dumps(tree, indent=1) + "\n"
    if path.exists() and path.read_bytes() != text.encode():
        raise UserError(
            f"{path} is there with other settings than these, and what was trained with them would be mixed up. "
            "Choose another folder with --to, or remove that row's"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, text)


def train_row(place, seed, title):
    """The result of one row and seed: trained, or gone on with, where there is none yet.

    Args:
        place: folder of the row, with its config.json.
        title: said when training begins.

    Returns:
        {"AP", "AP50", ...: 0..1 or None} of the last evaluation, or {"diverged": the step}.
    """
    folder = place / str(seed)
    if (folder / "result.json").exists() and (result := measurements.read_result(folder / "result.json")):
        return result
    folder.mkdir(parents=True, exist_ok=True)
    # A training holds this lock, too, should this process be killed; on its folder it has one of its own.
    with disk.locked(folder, title, name=LOCK, waiting=lambda holder: _say_waiting(title, holder)) as lock:
        result = _done(folder)  # another process may have been at it
        if not result:
            print(f"{title}: training; output in {folder / 'output.txt'}", flush=True)
            command = [
                sys.executable, str(TRAIN), "--config", str(place / "config.json"), "--workdir", str(folder),
                "--set", f"train.seed={seed}",
            ]  # fmt: skip
            status, said = _run(command, folder / "output.txt", lock)
            result = _result(status, said, folder, title)
            disk.write(folder / "result.json", json.dumps(result) + "\n")
    return result


def _done(folder):
    """The result.json of a row and seed, or None; a damaged one is set aside, and the row is finished again."""
    file = folder / "result.json"
    if not file.exists():
        return None
    result = measurements.read_result(file)
    if result is None:
        logger.warning("%s is damaged. It is kept as %s; it is written anew", file, disk.set_aside(file))
    return result


def _say_waiting(title, holder):
    print(f"{title}: another process trains it ({holder}); waiting for that to end", flush=True)


def _result(status, said, folder, title):
    diverged = NOT_FINITE.search(said)
    if status == USER_ERROR and diverged:
        return {"diverged": int(diverged[1])}
    if status:
        last = (said.strip().splitlines() or ["nothing"])[-1]
        raise UserError(
            f"{title}: training ended with status {status} and said: {last}. All of it is in {folder}/output.txt. "
            "Run the same command again: it goes on from there"
        )
    data = load_config(folder / "config.json").data
    metrics = coco_json.read_json(folder / "eval" / (data.test_split or data.val_split) / "metrics.json")
    return {key: metrics[key] for key in paper.METRICS}


def _run(command, log, lock):
    """Run a command to its end, its output added to a file: (status, what it said).

    It is in a session of its own, and so hears of a Ctrl-C only once, as the SIGTERM that is passed on to it.
    """
    with open(log, "ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, pass_fds=[lock]
        )
        try:
            process.wait()
        except BaseException:
            process.terminate()  # it saves what it has
            process.wait()
            raise
    with open(log, "rb") as file:
        file.seek(start)
        return process.returncode, file.read().decode(errors="replace")


@contextlib.contextmanager
def _terminated():
    """SIGTERM as an exception, so that a training is told before this process ends."""

    def stop(number, _):
        raise Interrupted(number, "rows that are done are kept. Run the same command again: it goes on")

    if threading.current_thread() is not threading.main_thread():  # Python allows no others
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _told(result):
    if "diverged" in result:
        return f"diverged in step {result['diverged']}"
    return f"AP {measurements.percent(result['AP'])}, AP50 {measurements.percent(result['AP50'])}"


def plan(table, scale, *, only=(), overrides=()):
    """One line for each row: name, what differs, iterations, batch, size of the images, and the paper's numbers."""
    printed = paper.rows(table)
    lines = []
    for row in tables.rows(table, scale, only):
        config = config_from_dict(tables.tree(table, row, scale, "data", overrides))
        train = config.train
        lines.append(
            f"{row.name}: {tables.differs(row, scale)} | {train.iterations:,} iterations of {train.batch_size} images, "
            f"shorter side {config.data.short_side} | {results_page.printed(printed.get(row.name, {}))}"
        )
    return lines
