"""An evaluation that was interrupted: its detections so far, in a file, batch by batch."""

import json
import logging
import os
import zlib
from pathlib import Path

import numpy as np

from retinanet_keras.storage import disk

logger = logging.getLogger("retinanet_keras")


class Unfinished:
    """The detections of the batches done, of one evaluation and no other.

    A batch is one line, a checksum and JSON. A line that a kill cut off is dropped; one that is damaged ends what is
    gone on from, and the file is kept under another name. Numbers come back as the float32 they were.

    Args:
        path: the file; None: nothing is kept.
        about: a dict, JSON-able, what the evaluation depends on; a file about something else is begun anew.
    """

    def __init__(self, path, about):
        self.path = path and Path(path)
        self.batches = []  # of the file as it was
        self.images = 0  # in the batches done
        if self.path is None:
            return
        head = _line(json.dumps(about))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self._read(head, about) if self.path.exists() else 0
        self.images = sum(map(len, self.batches))
        self._file = open(self.path, "r+b" if size else "wb")
        self._file.seek(size)
        self._file.truncate()
        if not size:
            self._file.write(head)
            self._file.flush()

    def add(self, batch):
        """A batch is done: a list of (image_id, boxes [n, 4], scores [n], labels [n]), NumPy."""
        self.images += len(batch)
        if self.path is not None:
            rows = [(image_id, *(array.tolist() for array in arrays)) for image_id, *arrays in batch]
            self._file.write(_line(json.dumps(rows)))
            self._file.flush()

    def finish(self):
        """All is done and written elsewhere: the file is removed."""
        if self.path is not None:
            self._file.close()
            os.unlink(self.path)

    def _read(self, head, about):
        """Fill `batches`; the bytes to keep of the file, 0 where it is begun anew."""
        with open(self.path, "rb") as file:
            first = file.readline()
            if first != head:
                self._tell_why(first, about)
                return 0
            size = len(first)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                content = _content(line)
                if content is None:
                    aside = disk.set_aside(self.path)
                    logger.warning("%s is damaged after %d images. It is kept as %s; the evaluation goes on from there",
                                   self.path, sum(map(len, self.batches)), aside)  # fmt: skip
                    break
                self.batches.append([_arrays(*one) for one in json.loads(content)])
                size += len(line)
        return size

    def _tell_why(self, first, about):
        content = _content(first)
        if content is None:
            if first:
                logger.warning("%s is damaged. It is kept as %s; the evaluation starts over",
                               self.path, disk.set_aside(self.path))  # fmt: skip
            return
        before = json.loads(content)
        changed = [key.replace("_", " ") for key, value in about.items() if before.get(key) != value]
        logger.warning("%s is of an evaluation with other %s: this one starts over", self.path, ", ".join(changed))


def _line(content):
    content = content.encode()
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _content(line):
    """The JSON of a line, bytes; None where the checksum does not fit."""
    checksum, _, content = line.rstrip(b"\n").partition(b" ")
    return content if checksum == b"%08x" % zlib.crc32(content) else None


def _arrays(image_id, boxes, scores, labels):
    return (
        image_id, np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, np.int32)
    )  # fmt: skip
