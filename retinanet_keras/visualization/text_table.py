"""Detections as lines of text."""

from retinanet_keras.storage.printable import printable

HEADER = f"{'image':<32} {'class':<16} {'score':>6} {'x1':>8} {'y1':>8} {'x2':>8} {'y2':>8}"


def rows(image, boxes, scores, names, min_score):
    """The lines of one image under HEADER, one for each detection of `min_score` or more.

    Args:
        image: its name; the end of a long one is shown, and of what is no text or a terminal's command, an escape.
        boxes: [n, 4], x1, y1, x2, y2.
        scores: [n].
        names: n class names.
    """
    lines, image = [], printable(image)[-32:]
    for box, score, name in zip(boxes, scores, names, strict=True):
        if score >= min_score:
            numbers = " ".join(f"{side:8.1f}" for side in box)
            lines.append(f"{image:<32} {printable(name[:16])[:16]:<16} {score:6.3f} {numbers}")
    return lines or [f"{image:<32} nothing with a score of {min_score} or more"]
