"""Train the rows of a table one after the other, each in its own process and folder.

DIR/data/                       generated images, at small scale
DIR/TABLE/ROW/config.json       the configuration for train.py
DIR/TABLE/ROW/SEED/             the run's folder (`training.run_folder`), and in it
    output.txt, result.json     output of the training; its result for the table, written last
DIR/TABLE/table.{txt,csv,html}  rewritten after every row
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from retinanet_keras.config import config_from_dict, load_config
from retinanet_keras.errors import Interrupted, UserError
from retinanet_keras.evaluation import coco_json
from retinanet_keras.experiments import measurements, paper, results_page, tables
from retinanet_keras.storage import disk

logger = logging.getLogger("retinanet_keras")
TRAIN = Path(__file__).parents[2] / "train.py"
NOT_FINITE = re.compile(r"error: The loss or its gradient is not finite in step (\d+)")
LOCK = ".row.lock"
USER_ERROR = 2  # exit status of a command that ends with a UserError


def run_table(
    table: str,
    scale: str,
    to: str | Path,
    *,
    only: Sequence[str] = (),
    seeds: int = 1,
    overrides: Sequence[str] = (),
) -> None:
    """Train the rows of a table that are not done yet, seed by seed; write the table after each row.

    A row whose loss becomes NaN or infinite has diverged: that is its result, and it is not trained again.

    Args:
        table: str. One of `tables.NAMES`.
        scale: str. "paper" or "small".
        to: str or Path. Folder of all tables at this scale.
        only: sequence of str. Rows and groups to train; empty for all.
        seeds: int. Number of seeds, from 0.
        overrides: sequence of str. `section.key=value` for all rows.

    Raises:
        UserError: where the folder holds other settings, or a training fails for another reason. Results of earlier
            rows are kept.
    """
    place = Path(to) / table
    for folder in (place, *place.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--to: {folder} is not a folder, and the experiments need one. Choose another folder")
    rows = tables.rows(table, scale, only)
    for row in rows:
        _write_config(place / row.name / "config.json", tables.tree(table, row, scale, Path(to) / "data", overrides))
    with _terminated():
        for seed in range(seeds):
            for number, row in enumerate(rows, 1):
                title = f"{table} {row.name}, seed {seed} ({number} of {len(rows)})"
                result = train_row(place / row.name, seed, title)
                print(f"{title}: {_describe(result)}", flush=True)
                results_page.write(place, table, scale)
    print(results_page.write(place, table, scale))


def _write_config(path: Path, tree: dict[str, Any]) -> None:
    """Check and write a row's configuration; a UserError where there is a different one."""
    config_from_dict(tree)
    text = json.dumps(tree, indent=1) + "\n"
    if path.exists() and path.read_bytes() != text.encode():
        raise UserError(
            f"{path} exists with other settings than these, and the results of both would be mixed. "
            "Choose another folder with --to, or remove that row's"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, text)


def train_row(place: Path, seed: int, title: str) -> dict[str, Any]:
    """Return the result of one row and seed, training it or resuming its training if there is none yet.

    Args:
        place: Path. Folder of the row, with its config.json.
        seed: int. Seed of the training.
        title: str. Printed when training begins.

    Returns:
        {"AP", "AP50", ...: 0..1 or None} of the last evaluation, or {"diverged": the step}.
    """
    folder = place / str(seed)
    if (folder / "result.json").exists() and (result := measurements.read_result(folder / "result.json")):
        return result
    folder.mkdir(parents=True, exist_ok=True)
    # The training inherits this lock, in case this process is killed; it has another one on its own folder.
    with disk.locked(folder, title, name=LOCK, waiting=lambda holder: _print_waiting(title, holder)) as lock:
        result = _read_finished(folder)  # another process may have trained it
        if not result:
            print(f"{title}: training; output in {folder / 'output.txt'}", flush=True)
            settings = ["--config", str(place / "config.json"), "--set", f"train.seed={seed}"]
            command = [sys.executable, str(TRAIN), *settings, "--workdir", str(folder)]
            status, output = _run(command, folder / "output.txt", lock)
            result = _result(status, output, folder, title)
            disk.write(folder / "result.json", json.dumps(result) + "\n")
    return result


def _read_finished(folder: Path) -> dict[str, Any] | None:
    """The result of a row and seed, or None; a damaged one is set aside, and the row is finished again."""
    file = folder / "result.json"
    if not file.exists():
        return None
    result = measurements.read_result(file)
    if result is None:
        logger.warning("%s is damaged. It is kept as %s; a new one will be written", file, disk.set_aside(file))
    return result


def _print_waiting(title: str, holder: str) -> None:
    print(f"{title}: another process trains it ({holder}); waiting for it to end", flush=True)


def _result(status: int, output: str, folder: Path, title: str) -> dict[str, Any]:
    """The result of a training that has ended; a UserError where it failed."""
    diverged = NOT_FINITE.search(output)
    if status == USER_ERROR and diverged:
        return {"diverged": int(diverged[1])}
    if status:
        last = (output.strip().splitlines() or ["nothing"])[-1]
        raise UserError(
            f"{title}: training ended with status {status} and said: {last}. The full output is in "
            f"{folder}/output.txt. Run the same command again to resume from there"
        )
    data = load_config(folder / "config.json").data
    metrics = coco_json.read_json(folder / "eval" / (data.test_split or data.val_split) / "metrics.json")
    return {key: metrics[key] for key in paper.METRICS}


def _run(command: Sequence[str], log: Path, lock: int) -> tuple[int, str]:
    """Run a command, appending its output to a file; (exit status, output).

    The command has its own session, so that it receives Ctrl-C only once, as the SIGTERM passed on to it.
    """
    with open(log, "ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, pass_fds=[lock]
        )
        try:
            process.wait()
        except BaseException:
            process.terminate()  # the training saves a checkpoint
            process.wait()
            raise
    with open(log, "rb") as file:
        file.seek(start)
        return process.returncode, file.read().decode(errors="replace")


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the training is stopped before this process ends."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Interrupted(number, "finished rows are saved. Run the same command again to continue")

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in no other thread
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _describe(result: dict[str, Any]) -> str:
    if "diverged" in result:
        return f"diverged in step {result['diverged']}"
    return f"AP {measurements.percent(result['AP'])}, AP50 {measurements.percent(result['AP50'])}"


def plan(table: str, scale: str, *, only: Sequence[str] = (), overrides: Sequence[str] = ()) -> list[str]:
    """Describe each row in a line: name, changes, iterations, batch, image size and the paper's numbers."""
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
