"""Detection in image files by a TF Serving server: pictures, a JSON file, and how long the answers take."""

import json
import sys
import time
from pathlib import Path

import numpy as np

from retinanet_keras.data.listing import image_files
from retinanet_keras.errors import DataError, ServerError, UserError
from retinanet_keras.serving import pictures
from retinanet_keras.serving.conversation import Refused, connect
from retinanet_keras.storage import disk
from retinanet_keras.storage.printable import printable
from retinanet_keras.visualization import text_table

# The signature and its input, by what is sent.
SIGNATURES = {"bytes": ("serving_bytes", "image_bytes"), "images": ("serving_default", "images")}
RESULTS_FILE = "detections.json"
LONGEST = 1_000_000  # seconds to wait; the system's clocks end somewhere above
MOST_DRAWN, MOST_CLASSES = 1000, 100_000  # boxes in a picture, the best ones; labels above are shown as numbers


def run(images, to, server, model, *, version=None, signature="bytes", batch=1, repeat=0, timeout=60.0, min_score=0.3):
    """`client`: a table of what a server finds in image files and folders, pictures of it, and all of it as JSON.

    Args:
        images: files and folders.
        to: folder for the pictures and RESULTS_FILE.
        server, model, version, timeout: as in `conversation.connect`.
        signature: "bytes" sends the files as they are; "images" decodes them here, and sends those of one size that
            follow each other together.
        batch: images in a request, at most.
        repeat: how often all images that were accepted are sent again to measure the time of an answer.
        min_score: of the detections shown; the JSON holds all.

    Returns:
        0, or 1 where an image could not be read or was refused; the others are done all the same.
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
    with disk.locked(to, "client"), connect(server, model, version=version, timeout=timeout) as ask, results:
        for group in _batches(files, signature, batch, results):
            for part, found in _answers(ask, signature, group, results):
                if repeat:
                    accepted.append([item for _, _, item in part])
                for i, (path, name, _) in enumerate(part):
                    record = _record(name, {key: value[i] for key, value in found.items()})
                    results.add(record)
                    _show(path, name, record["detections"], to, min_score)
        failed = sum("error" in record for record in results.records)
        print(f"{len(files) - failed} of {len(files)} images: pictures and {RESULTS_FILE} in {printable(to)}")
        if repeat and accepted:
            seconds = [_timed(ask, signature, items) for _ in range(repeat) for items in accepted]
            print(latency(seconds, repeat * sum(map(len, accepted))))
    return int(failed > 0)


class _Results:
    """The file of all answers so far, whole and valid JSON at any time, as a context at whose end it is complete.

    It is written after an answer, unless that would take more than a tenth of the time: then it is behind by some
    answers until the end, which an error and an interruption come to, too.
    """

    def __init__(self, path, server, model, signature):
        self.path, self.records = path, []
        self.head = {"server": server, "model": model, "signature": signature}
        self._next, self._behind = 0.0, False

    def add(self, record):
        self.records.append(record)
        self._behind = True
        if time.monotonic() >= self._next:
            self._write()

    def _write(self):
        began = time.monotonic()
        tree = {**self.head, "images": self.records}
        disk.write(self.path, json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        ended = time.monotonic()
        self._next, self._behind = ended + 9 * (ended - began), False

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if self._behind:
            self._write()
        if kind is ServerError and self.records:
            answered = sum("error" not in record for record in self.records)
            raise ServerError(f"{error}. The answers until then, to {answered} images, are in {self.path}") from None


def latency(seconds, images):
    """One line on requests sent one after the other. Args: the seconds of each; the images in all of them."""
    median, p90, p99 = 1000 * np.percentile(seconds, (50, 90, 99))
    return (
        f"{len(seconds)} requests, one at a time: median {median:.1f} ms, 90% within {p90:.1f} ms, 99% within "
        f"{p99:.1f} ms; {images / sum(seconds):.2f} images/s"
    )


def _batches(files, signature, batch, results):
    """Lists of (path, name, what is sent); files that cannot be read are told of, and go to the results."""
    group = []
    for path, name in files:
        try:
            item = path.read_bytes() if signature == "bytes" else pictures.read(path)
        except (OSError, DataError) as error:
            _failed(name, str(error), results)
            continue
        other_size = signature == "images" and group and group[0][2].shape != item.shape
        if group and (other_size or len(group) == batch):
            yield group
            group = []
        group.append((path, name, item))
    if group:
        yield group


def _answers(ask, signature, group, results):
    """(part of the group, its outputs). One bad image fails its whole batch, so then each is sent alone."""
    try:
        yield group, ask(*_request(signature, [item for _, _, item in group]))
        return
    except Refused as refusal:
        if len(group) == 1:
            _failed(group[0][1], f"the server refuses it: {refusal}", results)
            return
    for one in group:
        yield from _answers(ask, signature, [one], results)


def _request(signature, items):
    name, key = SIGNATURES[signature]
    return name, {key: items if signature == "bytes" else np.stack(items)}


def _timed(ask, signature, items):
    """The seconds from the items to their outputs, with writing the request and reading the answer."""
    start = time.perf_counter()
    ask(*_request(signature, items))
    return time.perf_counter() - start


def _record(name, found):
    """JSON-able: what was found in one image. Args: found: the outputs, without the batch's axis."""
    n = int(found["num_detections"])
    columns = [found[key][:n].tolist() for key in ("boxes", "scores", "labels", "category_ids", "names")]
    keys = ("box", "score", "label", "category_id", "name")
    return {"image": name, "detections": [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]}


def _failed(name, problem, results):
    print(f"error: {printable(name)}: {printable(problem)}", file=sys.stderr)
    results.add({"image": name, "error": problem})


def _show(path, name, detections, to, min_score):
    """The lines of the table, and the picture."""
    boxes, scores, labels, names = ([row[key] for row in detections] for key in ("box", "score", "label", "name"))
    print(*text_table.rows(name, boxes, scores, names, min_score), sep="\n")
    try:
        pixels = pictures.read(path)
    except DataError as error:
        print(f"warning: no picture: {printable(error)}", file=sys.stderr)  # the server reads more than Pillow here
        return
    shown = [i for i, score in enumerate(scores) if score >= min_score]
    shown, by_label = shown[:MOST_DRAWN], dict(zip(labels, names, strict=True))
    classes = [by_label.get(label, "") for label in range(min(max(labels, default=-1) + 1, MOST_CLASSES))]
    boxes, labels, scores = ([values[i] for i in shown] for values in (boxes, labels, scores))
    pictures.write(to, name, pixels, boxes, labels, classes, scores)
