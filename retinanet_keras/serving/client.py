"""Detection in image files by a TF Serving server: pictures, a JSON file, and the latency of its responses."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from retinanet_keras.data.listing import image_files
from retinanet_keras.errors import DataError, ServerError, UserError
from retinanet_keras.serving import pictures
from retinanet_keras.serving.conversation import Refused, connect
from retinanet_keras.storage import disk
from retinanet_keras.storage.printable import printable
from retinanet_keras.visualization import text_table

Item: TypeAlias = bytes | npt.NDArray  # an encoded image, or its pixels
Group: TypeAlias = list[tuple[Path, str, Item]]  # (path, name, what is sent) of the images of one request
Detect = Callable[[str, dict[str, Any]], dict[str, npt.NDArray]]  # as `conversation.connect` yields it
# The signature and its input, by what is sent.
SIGNATURES = {"bytes": ("serving_bytes", "image_bytes"), "images": ("serving_default", "images")}
RESULTS_FILE = "detections.json"
LONGEST = 1_000_000  # the longest timeout in seconds; system clocks overflow somewhere above
MOST_DRAWN, MOST_CLASSES = 1000, 100_000  # highest-scoring boxes in a picture; larger labels are shown as numbers


def run(
    images: Sequence[str | Path],
    to: str | Path,
    server: str,
    model: str,
    *,
    version: int | None = None,
    signature: str = "bytes",
    batch: int = 1,
    repeat: int = 0,
    timeout: float = 60.0,
    min_score: float = 0.3,
) -> int:
    """`client`: detect in image files and folders by a server; print a table, draw pictures, write all as JSON.

    Args:
        images: paths of files and folders.
        to: path. Folder for the pictures and RESULTS_FILE.
        server, model, version, timeout: as for `conversation.connect`.
        signature: str. "bytes" sends the files unchanged; "images" decodes them here, and batches consecutive images of
            equal size.
        batch: int. Largest number of images in a request.
        repeat: int. How often all accepted images are sent again to measure the latency.
        min_score: float. Lowest score of the detections that are shown; the JSON holds all.

    Returns:
        0, or 1 if an image could not be read or was refused; the other images are processed nevertheless.
    """
    for name, value, least in (("batch", batch, 1), ("repeat", repeat, 0)):
        if value < least:
            raise UserError(f"--{name}: expected {least} or more, got {value}")
    if not 0 < timeout <= LONGEST:
        raise UserError(f"--timeout: expected more than 0 and at most {LONGEST:,} seconds, got {timeout:g}")
    disk.check_folder(to, "--to")
    disk.check_file(Path(to, RESULTS_FILE), "--to")
    files, accepted = image_files(images), []
    Path(to).mkdir(parents=True, exist_ok=True)
    results = _Results(Path(to, RESULTS_FILE), server, model, SIGNATURES[signature][0])
    print(text_table.HEADER)
    with disk.locked(to, "client"), connect(server, model, version=version, timeout=timeout) as detect, results:
        for group in _batches(files, signature, batch, results):
            for part, outputs in _detect_group(detect, signature, group, results):
                if repeat:
                    accepted.append([item for _, _, item in part])
                for i, (path, name, _) in enumerate(part):
                    record = _record(name, {key: value[i] for key, value in outputs.items()})
                    results.add(record)
                    _show(path, name, record["detections"], to, min_score)
        failed = sum("error" in record for record in results.records)
        print(f"{len(files) - failed} of {len(files)} images: pictures and {RESULTS_FILE} in {printable(to)}")
        if repeat and accepted:
            seconds = [_timed(detect, signature, items) for _ in range(repeat) for items in accepted]
            print(latency(seconds, repeat * sum(map(len, accepted))))
    return int(failed > 0)


class _Results:
    """The file of all responses so far, valid JSON at any time; a context manager that completes it at its end.

    The file is written after each response, unless writing would take more than a tenth of the time: then it lags some
    responses behind until the end of the context, which also comes after an error or an interruption.
    """

    def __init__(self, path: Path, server: str, model: str, signature: str) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.head = {"server": server, "model": model, "signature": signature}
        self._next, self._behind = 0.0, False

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._behind = True
        if time.monotonic() >= self._next:
            self._write()

    def _write(self) -> None:
        began = time.monotonic()
        tree = {**self.head, "images": self.records}
        disk.write(self.path, json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        ended = time.monotonic()
        self._next, self._behind = ended + 9 * (ended - began), False

    def __enter__(self) -> _Results:
        return self

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if self._behind:
            self._write()
        if kind is ServerError and self.records:
            done = sum("error" not in record for record in self.records)
            raise ServerError(f"{error}. The detections until then, of {done} images, are in {self.path}") from None


def latency(seconds: Sequence[float], images: int) -> str:
    """One line about requests that were sent one at a time.

    Args:
        seconds: the seconds that each request took.
        images: int. Number of images in all of them.
    """
    median, p90, p99 = (1000 * float(np.percentile(seconds, q)) for q in (50, 90, 99))
    return (
        f"{len(seconds)} requests, one at a time: median {median:.1f} ms, 90% within {p90:.1f} ms, 99% within "
        f"{p99:.1f} ms; {images / sum(seconds):.2f} images/s"
    )


def _batches(files: Iterable[tuple[Path, str]], signature: str, batch: int, results: _Results) -> Iterator[Group]:
    """Yield the Group of each request; files that cannot be read are reported, and recorded in the results."""
    group: Group = []
    for path, name in files:
        try:
            item: Any = path.read_bytes() if signature == "bytes" else pictures.read(path)
        except (OSError, DataError) as error:
            _failed(name, str(error), results)
            continue
        other_size = signature == "images" and group and np.shape(group[0][2]) != item.shape
        if group and (other_size or len(group) == batch):
            yield group
            group = []
        group.append((path, name, item))
    if group:
        yield group


def _detect_group(
    detect: Detect, signature: str, group: Group, results: _Results
) -> Iterator[tuple[Group, dict[str, npt.NDArray]]]:
    """Yield (part of the group, its outputs). One bad image fails its whole batch, so then each is sent alone."""
    try:
        yield group, detect(*_request(signature, [item for _, _, item in group]))
        return
    except Refused as refusal:
        if len(group) == 1:
            _failed(group[0][1], f"the server refuses it: {refusal}", results)
            return
    for one in group:
        yield from _detect_group(detect, signature, [one], results)


def _request(signature: str, items: list[Item]) -> tuple[str, dict[str, Any]]:
    name, key = SIGNATURES[signature]
    return name, {key: items if signature == "bytes" else np.stack(items)}


def _timed(detect: Detect, signature: str, items: list[Item]) -> float:
    """The seconds from the items to their outputs, including encoding the request and reading the response."""
    start = time.perf_counter()
    detect(*_request(signature, items))
    return time.perf_counter() - start


def _record(name: str, outputs: dict[str, Any]) -> dict[str, Any]:
    """The detections of one image, JSON-able; `outputs` are without the batch axis."""
    n = int(outputs["num_detections"])
    columns = [outputs[key][:n].tolist() for key in ("boxes", "scores", "labels", "category_ids", "names")]
    keys = ("box", "score", "label", "category_id", "name")
    return {"image": name, "detections": [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]}


def _failed(name: str, problem: str, results: _Results) -> None:
    print(f"error: {printable(name)}: {printable(problem)}", file=sys.stderr)
    results.add({"image": name, "error": problem})


def _show(path: Path, name: str, detections: list[dict[str, Any]], to: str | Path, min_score: float) -> None:
    """Print the lines of the table, and draw the picture."""
    boxes, scores, labels, names = ([row[key] for row in detections] for key in ("box", "score", "label", "name"))
    print(*text_table.rows(name, boxes, scores, names, min_score), sep="\n")
    try:
        pixels = pictures.read(path)
    except DataError as error:
        print(
            f"warning: no picture: {printable(error)}", file=sys.stderr
        )  # the server decodes files that Pillow does not
        return
    shown = [i for i, score in enumerate(scores) if score >= min_score]
    shown, by_label = shown[:MOST_DRAWN], dict(zip(labels, names, strict=True))
    classes = [by_label.get(label, "") for label in range(min(max(labels, default=-1) + 1, MOST_CLASSES))]
    boxes, labels, scores = ([values[i] for i in shown] for values in (boxes, labels, scores))
    pictures.write(to, name, pixels, boxes, labels, classes, scores)
