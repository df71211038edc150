"""§5.1, Online hard example mining: select the few anchors of highest loss, which the focal loss is compared with.

Table 1d: batch sizes 128, 256 and 512 with an NMS threshold of .7 or .5, and the same batch sizes with .5 at 1:3. The
best is batch size 128 at .5 without 1:3.
"""

from keras import ops

from retinanet_keras import boxes
from retinanet_keras.tensors import Tensor

PICKS = 2048  # not in the paper: after so many picks in an image, the NMS at 1:3 ignores negatives


def select(
    losses: Tensor,
    anchors: Tensor,
    positive: Tensor,
    valid: Tensor,
    *,
    batch_size: int,
    nms_iou: float,
    ratio: int | None = None,
) -> Tensor:
    """Select the anchors that an image trains on: NMS over the anchors by their losses, then the highest that survive.

    The anchor of highest loss is picked, those that overlap it are suppressed, and so on; the first among equals. Picks
    come in descending order of loss, so the first `batch_size` of them are the highest of all survivors, and the NMS
    stops there; memory is a few arrays of [B, A].

    With a `ratio`, which is SSD's variant, there is still one NMS over positives and negatives together. Selected are
    the positives that survive, up to `batch_size` of them, and of the negatives that survive the highest, up to `ratio`
    times the number of positives and to what is left of `batch_size`: none where there is no positive.

    Whether a positive survives depends on the negatives of higher loss, so NMS continues until no positive is left,
    but not through all the easy negatives: after `PICKS` picks in an image it ignores negatives, and the positives left
    compete with each other and with the picks so far. An NMS that ends before that is exact.

    Args:
        losses: float tensor [B, A]. Loss of every anchor summed over the classes. No gradient passes.
        anchors: float tensor [A, 4]. Absolute pixels x1, y1, x2, y2; used as they are, not clipped.
        positive: bool tensor [B, A]. Whether an anchor is positive.
        valid: bool tensor [B, A]. An anchor that is not valid is neither selected nor suppresses another.
        batch_size: int. Largest number of anchors selected in an image.
        nms_iou: float. An anchor that overlaps a picked one by more is suppressed.
        ratio: int or None. Negatives per positive; 3 is the paper's 1:3.

    Returns:
        bool tensor [B, A], True for the selected anchors.
    """
    anchors = ops.cast(ops.convert_to_tensor(anchors), "float32")
    valid = ops.cast(ops.convert_to_tensor(valid), "bool")
    # The first kind is selected up to the batch size, the second up to `room`; without a ratio all are of the first.
    first = valid if ratio is None else valid & ops.cast(ops.convert_to_tensor(positive), "bool")
    second = valid & ~first
    losses = ops.stop_gradient(ops.cast(ops.convert_to_tensor(losses), "float32"))
    losses = ops.where(ops.isnan(losses), float("inf"), losses)  # selected, so that the total shows it
    index = ops.arange(ops.shape(anchors)[0])[None]  # [1, A]

    def room(firsts):
        return ops.minimum((ratio or 0) * firsts, batch_size - firsts)

    def unfinished(step, remaining, rank, firsts, seconds):
        alive = remaining > -float("inf")
        more_firsts = ops.any(alive & first, axis=1) & (firsts < batch_size)  # [B]
        more_seconds = ops.any(alive & second, axis=1) & (seconds < room(firsts))
        return ops.any(more_firsts | more_seconds)

    def pick(step, remaining, rank, firsts, seconds):
        best = ops.argmax(remaining, axis=1)[:, None]  # [B, 1]
        any_left = ops.take_along_axis(remaining, best, axis=1) > -float("inf")
        of_first = ops.take_along_axis(first, best, axis=1)
        picked = (index == best) & any_left  # [B, A]
        rank = ops.where(picked, ops.where(of_first, firsts[:, None], seconds[:, None]), rank)
        overlap = boxes.iou(ops.take(anchors, best, axis=0), anchors)[:, 0]
        removed = picked | ((overlap > nms_iou) & any_left)
        if ratio is not None:
            removed = removed | (second & (step + 1 >= PICKS))
        counted = [ops.cast((any_left & kind)[:, 0], "int32") for kind in (of_first, ~of_first)]
        remaining = ops.where(removed, -float("inf"), remaining)
        return step + 1, remaining, rank, firsts + counted[0], seconds + counted[1]

    zero_counts = ops.zeros((ops.shape(losses)[0],), "int32")
    start = (
        ops.zeros((), "int32"),
        ops.where(valid, losses, -float("inf")),
        ops.full(ops.shape(losses), batch_size, "int32"),  # each anchor's rank among the picks of its kind
        zero_counts,
        zero_counts,
    )
    _, _, rank, firsts, _ = ops.while_loop(unfinished, pick, start)
    firsts = ops.minimum(firsts, batch_size)  # while other images went on, one may have picked more
    return rank < ops.where(first, batch_size, room(firsts)[:, None])
