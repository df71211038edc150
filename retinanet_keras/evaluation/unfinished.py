"""The detections of an interrupted evaluation, stored batch by batch so that it can resume."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retinanet_keras.evaluation.results import ImageDetections
from retinanet_keras.storage import disk

logger = logging.getLogger("retinanet_keras")


class Unfinished:
    """The finished batches of one particular evaluation.

    A batch is one line: a checksum and JSON. A line that a kill cut short is ignored; from a damaged line on, the file
    is not used, and a copy of it is saved under another name. Numbers are read back as the float32 they were.

    Args:
        path: path of the file. None: nothing is stored.
        about: dict, JSON-able. What the evaluation depends on; a file with another `about` is overwritten.

    Attributes:
        batches: list of lists of ImageDetections. The batches that the file held when it was opened.
        images: int. Number of images in all finished batches.
    """

    def __init__(self, path: str | os.PathLike[str] | None, about: dict[str, Any]) -> None:
        self.path = Path(path) if path else None
        self.batches: list[list[ImageDetections]] = []
        self.images = 0
        if self.path is None:
            return
        head = _line(json.dumps(about))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self._read(self.path, head, about) if self.path.exists() else 0
        self.images = sum(map(len, self.batches))
        self._file = open(self.path, "r+b" if size else "wb")
        self._file.seek(size)
        self._file.truncate()
        if not size:
            self._file.write(head)
            self._file.flush()

    def add(self, batch: Sequence[ImageDetections]) -> None:
        """Store a finished batch."""
        self.images += len(batch)
        if self.path is not None:
            rows = [
                (one.image_id, *(np.asarray(values).tolist() for values in (one.boxes, one.scores, one.labels)))
                for one in batch
            ]
            self._file.write(_line(json.dumps(rows)))
            self._file.flush()

    def finish(self) -> None:
        """Remove the file, once the results of the whole evaluation are written."""
        if self.path is not None:
            self._file.close()
            os.unlink(self.path)

    def _read(self, path: Path, head: bytes, about: dict[str, Any]) -> int:
        """Fill `batches`; return how many bytes of the file are valid, 0 to overwrite it."""
        with open(path, "rb") as file:
            first = file.readline()
            if first != head:
                _warn_of_new_start(path, first, about)
                return 0
            size = len(first)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                content = _content(line)
                if content is None:
                    logger.warning(
                        "%s is damaged after %d images. It was copied to %s; the evaluation resumes after these images",
                        path,
                        sum(map(len, self.batches)),
                        disk.set_aside(path),
                    )
                    break
                self.batches.append([_image_detections(*row) for row in json.loads(content)])
                size += len(line)
        return size


def _warn_of_new_start(path: Path, first: bytes, about: dict[str, Any]) -> None:
    """Log why a file with this first line is not resumed from."""
    content = _content(first)
    if content is None:
        if first:
            aside = disk.set_aside(path)
            logger.warning("%s is damaged. It was copied to %s; the evaluation starts over", path, aside)
        return
    before = json.loads(content)
    changed = [key.replace("_", " ") for key, value in about.items() if before.get(key) != value]
    logger.warning("%s is from an evaluation with other %s: this one starts over", path, ", ".join(changed))


def _line(content: str) -> bytes:
    encoded = content.encode()
    return b"%08x %s\n" % (zlib.crc32(encoded), encoded)


def _content(line: bytes) -> bytes | None:
    """The JSON of a line; None if the checksum does not match."""
    checksum, _, content = line.rstrip(b"\n").partition(b" ")
    return content if checksum == b"%08x" % zlib.crc32(content) else None


def _image_detections(image_id: Any, boxes: list, scores: list, labels: list) -> ImageDetections:
    return ImageDetections(
        image_id,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        np.array(labels, np.int32),
    )
