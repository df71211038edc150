"""Online hard example mining: by hand, and against a whole NMS in NumPy, eager, in a graph and under XLA."""

import functools

import backends
import keras
import numpy as np
import pytest
import reference
from keras import ops

from retinanet_keras import mining
from retinanet_keras.anchors import anchor_boxes

pytestmark = pytest.mark.check


@functools.cache
def graph(batch_size, ratio, picks):
    """`select` of all sizes and thresholds; eagerly, hundreds of picks are slow."""
    del picks  # what it is traced with
    return backends.compiled(
        lambda *args: mining.select(*args[:4], batch_size=batch_size, nms_iou=args[4], ratio=ratio)
    )


def run(losses, anchors, positive, valid, *, batch_size, nms_iou, ratio=None):
    chosen = graph(batch_size, ratio, mining.PICKS)(losses, anchors, positive, valid, np.float32(nms_iou))
    assert keras.backend.standardize_dtype(chosen.dtype) == "bool"
    return ops.convert_to_numpy(chosen)


def check(chosen, losses, anchors, positive, valid, **settings):
    """A batch against the reference, image by image."""
    for b in range(len(losses)):
        expected = reference.ohem(losses[b], anchors, positive[b], valid[b], **settings)
        np.testing.assert_array_equal(np.flatnonzero(chosen[b]), np.flatnonzero(expected))


def example(seed, batch=2, count=400, side=100, positives=0.06):
    """Anchors of which many overlap; losses that are higher on positives but not always; a tenth ignored."""
    rng = np.random.default_rng(seed)
    corner, sides = rng.uniform(0, side, (count, 2)), rng.uniform(8, 40, (count, 2))
    anchors = np.concatenate([corner, corner + sides], axis=1).astype("float32")
    positive = rng.random((batch, count)) < positives
    losses = np.exp(rng.normal(-3, 1.5, (batch, count)) + positive).astype("float32")
    return losses, anchors, positive, rng.random((batch, count)) < 0.9


# By hand


# IoU of 0 and 1: 8/12, of 1 and 2: 6/14, of 0 and 2: 4/16; the others stand alone.
ROW = np.float32([[x, 0, x + 10, 10] for x in (0, 2, 6, 30, 50, 70, 90)])
LOSSES = np.float32([[0.7, 0.9, 0.8, 0.1, 0.3, 0.2, 0.0]])
NONE, ALL = np.zeros((1, 7), bool), np.ones((1, 7), bool)


@pytest.mark.parametrize("batch_size, nms_iou, expected", [
    (3, 0.5, [1, 2, 4]),  # 1 drops 0
    (3, 0.7, [0, 1, 2]),
    (3, 0.4, [1, 4, 5]),  # 1 drops 0 and 2
    (6, 0.5, [1, 2, 3, 4, 5, 6]),  # a loss of 0 is a candidate like another
    (9, 0.5, [1, 2, 3, 4, 5, 6]),
])  # fmt: skip
def test_by_hand(batch_size, nms_iou, expected):
    chosen = run(LOSSES, ROW, NONE, ALL, batch_size=batch_size, nms_iou=nms_iou)
    assert np.flatnonzero(chosen[0]).tolist() == expected


@pytest.mark.parametrize("positives, batch_size, expected", [
    ([3], 128, [1, 2, 3, 4]),  # the lowest but one; three negatives
    ([0, 3], 128, [1, 2, 3, 4]),  # the negative 1 drops the positive 0: negatives for one
    ([1, 3, 4], 5, [1, 2, 3, 4, 5]),  # two negatives fill the batch
    ([1, 3, 4], 2, [1, 4]),  # the highest positives, and no negative
    ([0], 128, []),  # no positive survives
    ([], 128, []),
    (range(7), 128, [1, 2, 3, 4, 5, 6]),
])  # fmt: skip
def test_one_to_three_by_hand(positives, batch_size, expected):
    positive = np.isin(np.arange(7), list(positives))[None]
    chosen = run(LOSSES, ROW, positive, ALL, batch_size=batch_size, nms_iou=0.5, ratio=3)
    assert np.flatnonzero(chosen[0]).tolist() == expected


def test_the_first_of_equals_is_picked():
    anchors, losses = ROW[[3, 3, 4, 4]], np.full((1, 4), 0.5)
    every = np.ones((1, 4), bool)
    assert run(losses, anchors, every, every, batch_size=9, nms_iou=0.5)[0].tolist() == [True, False, True, False]
    assert run(losses, anchors, every, every, batch_size=1, nms_iou=0.5)[0].tolist() == [True, False, False, False]


@pytest.mark.parametrize("ratio", [None, 3])
def test_a_loss_that_is_not_a_number_is_taken(ratio):
    """It ends no search, and hides from no one."""
    losses = np.float32([[0.7, 0.9, np.nan, 0.1, 0.3, 0.2, np.inf]])
    chosen = run(losses, ROW, ALL, ALL, batch_size=3, nms_iou=0.5, ratio=ratio)
    assert np.flatnonzero(chosen[0]).tolist() == [1, 2, 6]


# Against the reference


@pytest.mark.parametrize("ratio", [None, 3])
@pytest.mark.parametrize("nms_iou", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_equal_to_a_whole_nms(seed, nms_iou, ratio):
    batch = example(seed, count=(400, 600)[seed])
    chosen = run(*batch, batch_size=24, nms_iou=nms_iou, ratio=ratio)
    check(chosen, *batch, batch_size=24, nms_iou=nms_iou, ratio=ratio)
    assert (chosen <= batch[3]).all() and (chosen.sum(axis=1) <= 24).all()


TABLE_1D = [(128, 0.7, None), (256, 0.7, None), (512, 0.7, None), (128, 0.5, None), (256, 0.5, None), (512, 0.5, None),
            (128, 0.5, 3), (256, 0.5, 3), (512, 0.5, 3)]  # fmt: skip


IN_SHORT = {(128, 0.5, 3), (256, 0.5, None), (512, 0.7, None)}  # each takes XLA seconds to compile


@pytest.mark.parametrize(
    "batch_size, nms_iou, ratio",
    [row if row in IN_SHORT else pytest.param(*row, marks=pytest.mark.slow) for row in TABLE_1D],
)
def test_the_settings_of_table_1d(batch_size, nms_iou, ratio):
    """On the paper's anchors, with losses that stand together as the losses around an object do; XLA."""
    rng = np.random.default_rng(batch_size)
    anchors = ops.convert_to_numpy(anchor_boxes(96, 128))
    hard = reference.iou(anchors, [[20, 20, 70, 90], [60, 10, 120, 60]])  # [A, 2]
    losses = (hard.T + rng.gamma(0.3, 0.2, (2, len(anchors)))).astype("float32")
    batch = losses, anchors, hard.T > 0.5, (hard.T < 0.4) | (hard.T > 0.5)
    settings = {"batch_size": batch_size, "nms_iou": nms_iou, "ratio": ratio}
    chosen = backends.compiled(lambda *args: mining.select(*args, **settings), xla=True)(*batch)
    chosen = ops.convert_to_numpy(chosen)
    check(chosen, *batch, **settings)
    if ratio:
        positives = (chosen & batch[2]).sum(axis=1)
        np.testing.assert_array_equal((chosen & ~batch[2]).sum(axis=1), 3 * positives)
        assert (positives > 0).all()


@pytest.mark.parametrize("ratio", [None, 3])
def test_ties_and_duplicates(ratio):
    """Whole numbers make equal losses, equal anchors, and overlaps of exactly the threshold."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        corner, sides = rng.integers(0, 12, (150, 2)), rng.integers(0, 5, (150, 2))
        anchors = np.concatenate([corner, corner + sides], axis=1).astype("float32")
        losses = rng.integers(0, 4, (2, 150)).astype("float32")
        batch = losses, anchors, rng.random((2, 150)) < 0.1, rng.random((2, 150)) < 0.9
        check(run(*batch, batch_size=40, nms_iou=0.5, ratio=ratio), *batch, batch_size=40, nms_iou=0.5, ratio=ratio)


@pytest.mark.parametrize("ratio", [None, 3])
def test_images_short_of_anchors_or_of_positives(ratio):
    """No positive, positives only, fewer valid anchors than the batch takes, none at all."""
    losses, anchors, positive, valid = example(3, batch=5)
    positive[0], positive[1] = False, True
    valid[2] = np.arange(400) < 10
    valid[3] = False
    batch = losses, anchors, positive, valid
    chosen = run(*batch, batch_size=64, nms_iou=0.5, ratio=ratio)
    check(chosen, *batch, batch_size=64, nms_iou=0.5, ratio=ratio)
    assert chosen.sum(axis=1)[[0, 1, 3]].tolist() == [0 if ratio else 64, 64, 0]
    assert chosen[2].sum() <= 10 and (ratio or chosen[2].any())
    for b in range(5):  # no image depends on its company
        alone = [losses[b][None], anchors, positive[b][None], valid[b][None]]
        np.testing.assert_array_equal(run(*alone, batch_size=64, nms_iou=0.5, ratio=ratio)[0], chosen[b])


@pytest.mark.parametrize("ratio", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_the_same_eagerly_and_under_xla(ratio):
    settings = {"batch_size": 16, "nms_iou": 0.5, "ratio": ratio}
    jitted = backends.compiled(lambda *args: mining.select(*args, **settings), xla=True)
    batch = example(4, count=80)
    check(run(*batch, **settings), *batch, **settings)
    check(ops.convert_to_numpy(mining.select(*batch, **settings)), *batch, **settings)
    check(ops.convert_to_numpy(jitted(*batch)), *batch, **settings)


# The end of the search at 1:3


def late_positives():
    """Sixty far negatives, each of higher loss than the positives; the negatives 60, 61 and the positives 62 to 64.

    The negative 60 overlaps the positive 62, and 61 the positive 63; 64 is the copy of 63.
    """
    x = np.concatenate([np.arange(60) * 20, [2000, 2100, 2000, 2100, 2100]])
    anchors = np.stack([x, 0 * x, x + 10, 0 * x + 10], axis=1).astype("float32")
    losses = np.float32([np.arange(65, 0, -1)])
    return losses, anchors, np.arange(65)[None] >= 62, np.ones((1, 65), bool)


@pytest.mark.parametrize("picks, expected", [
    (64, []),  # 60 and 61 are picked, and drop all three positives
    (56, [0, 1, 2, 3, 4, 62, 63]),  # 60 and 61 are out, 63 drops its copy
])  # fmt: skip
def test_after_so_many_picks_only_positives_are_picked(picks, expected, monkeypatch):
    monkeypatch.setattr(mining, "PICKS", picks)
    chosen = run(*late_positives(), batch_size=7, nms_iou=0.5, ratio=3)[0]
    assert np.flatnonzero(chosen).tolist() == expected


def test_a_search_that_ends_before_that_is_exact(monkeypatch):
    """Every limit that lets the search reach the lowest positive gives the same."""
    batch = losses, anchors, positive, valid = example(6, positives=0.15)
    settings = {"batch_size": 40, "nms_iou": 0.5, "ratio": 3}
    needed = 0
    for b in range(2):
        survivors = reference.ohem(losses[b], anchors, positive[b], valid[b], len(anchors), 0.5)
        needed = max(needed, (losses[b, survivors] >= losses[b, positive[b] & valid[b]].min()).sum())
    assert 100 < needed < 400
    for picks in (needed, needed + 1, 400):
        monkeypatch.setattr(mining, "PICKS", picks)
        check(run(*batch, **settings), *batch, **settings)
    monkeypatch.setattr(mining, "PICKS", 40)
    with pytest.raises(AssertionError):
        check(run(*batch, **settings), *batch, **settings)


def test_no_gradient_passes():
    """The derivative of the sum of the losses chosen is that choice, and no more."""
    losses, anchors, positive, valid = example(7, count=50)
    settings = {"batch_size": 8, "nms_iou": 0.5}

    def total(x):
        return ops.where(mining.select(x, anchors, positive, valid, **settings), x, 0.0)

    _, slope = backends.value_and_slope(total, losses)
    check(slope > 0, losses, anchors, positive, valid, **settings)
    assert set(np.unique(slope)) == {0, 1}
