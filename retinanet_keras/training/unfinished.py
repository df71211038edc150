"""An evaluation that was interrupted: what it has found so far, in a file, batch by batch."""

import json
import os
from pathlib import Path

import numpy as np


class Unfinished:
    """The detections of the batches done, of one evaluation and no other.

    A batch is one line of JSON; a line that a kill cut off is dropped. Numbers come back as the float32 they were.

    Args:
        path: the file; None: nothing is kept.
        about: JSON-able, what the evaluation depends on; a file about something else is begun anew.
    """

    def __init__(self, path, about):
        self.path = path and Path(path)
        self.batches = []  # of the file as found
        if self.path is None:
            return
        head = json.dumps(about)
        size = 0
        if self.path.exists():
            with open(self.path, "rb") as file:
                if file.readline().decode(errors="replace").rstrip("\n") == head:
                    size = file.tell()
                    for line in file:
                        if not line.endswith(b"\n"):
                            break
                        self.batches.append([_arrays(*one) for one in json.loads(line)])
                        size += len(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "r+b" if size else "wb")
        self._file.seek(size)
        self._file.truncate()
        if not size:
            self._file.write(head.encode() + b"\n")

    def add(self, batch):
        """A batch is done: a list of (image_id, boxes [n, 4], scores [n], labels [n]), NumPy."""
        if self.path is not None:
            rows = [(image_id, *(array.tolist() for array in arrays)) for image_id, *arrays in batch]
            self._file.write(json.dumps(rows).encode() + b"\n")
            self._file.flush()

    def finish(self):
        """All is done and written elsewhere: the file is removed."""
        if self.path is not None:
            self._file.close()
            os.unlink(self.path)


def _arrays(image_id, boxes, scores, labels):
    return (
        image_id, np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, np.int32)
    )  # fmt: skip
