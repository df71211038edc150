"""Detections as a table of text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from retinanet_keras.storage.printable import printable

HEADER = f"{'image':<32} {'class':<16} {'score':>6} {'x1':>8} {'y1':>8} {'x2':>8} {'y2':>8}"


def rows(
    image: str, boxes: Iterable[Any], scores: Iterable[float], names: Iterable[str], min_score: float
) -> list[str]:
    """The lines of one image under HEADER, one for each detection with a score of at least `min_score`.

    Args:
        image: str. The image's name; only the end of a long name is shown, and invalid or control characters are
            escaped.
        boxes: [n, 4]. x1, y1, x2, y2 in pixels.
        scores: [n].
        names: n class names, one for each detection.
        min_score: float. Detections with a lower score are not listed.
    """
    lines, image = [], printable(image)[-32:]
    for box, score, name in zip(boxes, scores, names, strict=True):
        if score >= min_score:
            numbers = " ".join(f"{side:8.1f}" for side in box)
            lines.append(f"{image:<32} {printable(name[:16])[:16]:<16} {score:6.3f} {numbers}")
    return lines or [f"{image:<32} nothing with a score of {min_score} or more"]
