"""§5.1, Online hard example mining: the few anchors of highest loss that the focal loss is compared with.

Table 1d: batch sizes 128, 256 and 512 with an NMS threshold of .7 or .5, and the same batch sizes with .5 at 1:3. The
best is batch size 128 at .5 without 1:3.
"""

from keras import ops

from retinanet_keras import boxes

PICKS = 2048  # ours: after so many in an image, the search at 1:3 leaves negatives out


def select(losses, anchors, positive, valid, *, batch_size, nms_iou, ratio=None):
    """The anchors that an image trains on: NMS over the anchors by their losses, then the highest losses that survive.

    The anchor of highest loss is picked, those that overlap it are dropped, and so on; the first among equals. Picks
    come by falling loss, so the first `batch_size` of them are the highest of all survivors, and the search stops
    there; memory is a few arrays of [B, A].

    With a `ratio`, which is SSD's variant, there is still one NMS over positives and negatives together. Taken are the
    positives that survive, up to `batch_size` of them, and of the negatives that survive the highest, up to `ratio`
    times the number of positives and to what is left of `batch_size`: none where there is no positive.

    Whether a positive survives depends on the negatives of higher loss, so the search goes on until no positive is
    left, but not through all the easy negatives: after `PICKS` picks in an image, negatives are out, and the positives
    left compete with each other and with the picks so far. A search that ends before that is exact.

    Args:
        losses: [B, A], the loss of every anchor summed over the classes. No gradient passes.
        anchors: [A, 4], absolute pixels x1, y1, x2, y2; used as they are, not clipped.
        positive: bool [B, A].
        valid: bool [B, A]; an ignored anchor is neither taken nor suppresses another.
        batch_size: the most anchors taken in an image.
        nms_iou: an anchor that overlaps a picked one by more is dropped.
        ratio: None, or an integer, negatives per positive; 3 is the paper's 1:3.

    Returns:
        bool [B, A].
    """
    anchors = ops.cast(ops.convert_to_tensor(anchors), "float32")
    valid = ops.cast(ops.convert_to_tensor(valid), "bool")
    # The first kind is taken up to the batch size, the second up to `room`; without a ratio all are of the first.
    first = valid if ratio is None else valid & ops.cast(ops.convert_to_tensor(positive), "bool")
    second = valid & ~first
    losses = ops.stop_gradient(ops.cast(ops.convert_to_tensor(losses), "float32"))
    losses = ops.where(ops.isnan(losses), float("inf"), losses)  # taken, so that the total shows it
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
        dropped = picked | ((overlap > nms_iou) & any_left)
        if ratio is not None:
            dropped = dropped | (second & (step + 1 >= PICKS))
        counted = [ops.cast((any_left & kind)[:, 0], "int32") for kind in (of_first, ~of_first)]
        remaining = ops.where(dropped, -float("inf"), remaining)
        return step + 1, remaining, rank, firsts + counted[0], seconds + counted[1]

    nobody = ops.zeros((ops.shape(losses)[0],), "int32")
    start = (
        ops.zeros((), "int32"),
        ops.where(valid, losses, -float("inf")),
        ops.full(ops.shape(losses), batch_size, "int32"),  # each anchor's place among the picks of its kind
        nobody,
        nobody,
    )
    _, _, rank, firsts, _ = ops.while_loop(unfinished, pick, start)
    firsts = ops.minimum(firsts, batch_size)  # while other images searched on, one may have picked more
    return rank < ops.where(first, batch_size, room(firsts)[:, None])
