"""Anchors: hand-worked corners, the order, and the paper's sizes."""

import itertools
import math

import backends
import numpy as np
import pytest
import reference
from keras import ops

from retinanet_keras.anchors import LEVELS, STRIDES, anchor_boxes, cell_anchors, level_sizes
from retinanet_keras.config import AnchorConfig

pytestmark = pytest.mark.check


def all_anchors(height, width, config=AnchorConfig()):  # noqa: B008
    return ops.convert_to_numpy(anchor_boxes(height, width, config))


def test_levels():
    assert LEVELS == (3, 4, 5, 6, 7)
    assert STRIDES == (8, 16, 32, 64, 128)


def test_first_and_last_anchors_by_hand():
    anchors = all_anchors(256, 256)
    wide, high = 16 * math.sqrt(2), 8 * math.sqrt(2)  # half sides of area 32^2, h / w = 1/2
    np.testing.assert_allclose(anchors[0], [4 - wide, 4 - high, 4 + wide, 4 + high], rtol=1e-6)
    np.testing.assert_allclose(anchors[1], [4 - 16, 4 - 16, 4 + 16, 4 + 16], rtol=1e-6)
    np.testing.assert_allclose(anchors[2], [4 - high, 4 - wide, 4 + high, 4 + wide], rtol=1e-6)
    half = 16 * 2 ** (1 / 3)
    np.testing.assert_allclose(anchors[4], [4 - half, 4 - half, 4 + half, 4 + half], rtol=1e-6)
    np.testing.assert_allclose(anchors[10], [12 - 16, 4 - 16, 12 + 16, 4 + 16], rtol=1e-6)  # next column, ratio 1
    # the last: P7, cell (1, 1) around 192, 192; side 512 * 2^(2/3), h / w = 2
    half = 256 * 2 ** (2 / 3)
    x, y = half / math.sqrt(2), half * math.sqrt(2)
    np.testing.assert_allclose(anchors[-1], [192 - x, 192 - y, 192 + x, 192 + y], rtol=1e-6)


@pytest.mark.parametrize("height, width", [(64, 96), (100, 130), (33, 257), (1, 1)])
def test_equal_to_the_plain_loops(height, width):
    np.testing.assert_allclose(all_anchors(height, width), reference.anchors(height, width), rtol=1e-5, atol=1e-4)


TABLE_1C = [(1, 1), (2, 1), (3, 1), (1, 3), (2, 3), (3, 3), (4, 3)]  # scales, aspect ratios


@pytest.mark.parametrize("height, width", [(256, 384), (203, 330)])
@pytest.mark.parametrize("settings", [
    *[{"scales": scales, "ratios": (1.0,) if ratios == 1 else (0.5, 1.0, 2.0)} for scales, ratios in TABLE_1C],
    {"size": 2.0, "scales": 2, "ratios": (0.25, 0.5, 1.0, 3.0, 4.0)},
])  # fmt: skip
def test_the_settings_of_table_1c_equal_float64(settings, height, width):
    """To a ten-thousandth of a pixel."""
    found = all_anchors(height, width, AnchorConfig(**settings))
    np.testing.assert_allclose(found, reference.anchors(height, width, **settings), rtol=0, atol=1e-4)


def test_order_is_level_row_column_scale_ratio():
    anchors = all_anchors(128, 192)
    index = 0
    for stride in STRIDES:
        rows, columns = math.ceil(128 / stride), math.ceil(192 / stride)
        for row, column, k, ratio in itertools.product(range(rows), range(columns), range(3), (0.5, 1.0, 2.0)):
            x1, y1, x2, y2 = anchors[index]
            assert (x1 + x2) / 2 == pytest.approx((column + 0.5) * stride, abs=1e-3)
            assert (y1 + y2) / 2 == pytest.approx((row + 0.5) * stride, abs=1e-3)
            assert math.sqrt((x2 - x1) * (y2 - y1)) == pytest.approx(4 * stride * 2 ** (k / 3), rel=1e-5)
            assert (y2 - y1) / (x2 - x1) == pytest.approx(ratio, rel=1e-5)
            index += 1
    assert index == len(anchors)


def test_areas_are_the_papers():
    sides = [math.sqrt(np.prod(cell_anchors(stride)[0, 2:] * 2)) for stride in STRIDES]
    np.testing.assert_allclose(sides, [32, 64, 128, 256, 512], rtol=1e-6)
    anchors = all_anchors(512, 512)
    sides = np.sqrt((anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1]))
    assert sides.min() == pytest.approx(32, rel=1e-5)  # §4: "they cover the scale range 32 - 813 pixels"
    assert sides.max() == pytest.approx(813, abs=0.5)


def test_count_of_the_papers_size():
    assert level_sizes(800, 1344) == [151200, 37800, 9450, 2457, 693]
    assert sum(level_sizes(800, 1344)) == 201600
    assert all_anchors(800, 1344).shape == (201600, 4)


@pytest.mark.parametrize("height, width", [(7, 9), (100, 130), (129, 640), (800, 1333)])
def test_level_sizes_count_partial_cells_and_add_up(height, width):
    sizes = level_sizes(height, width)
    assert sizes == [9 * math.ceil(height / s) * math.ceil(width / s) for s in STRIDES]
    assert sum(sizes) == len(all_anchors(height, width))


def test_anchors_are_neither_rounded_nor_clipped():
    anchors = all_anchors(32, 32)
    assert anchors.min() < -100 and anchors.max() > 200
    assert anchors.dtype == "float32"
    assert np.abs(anchors - anchors.round()).max() > 0.3


def test_other_scales_and_ratios():
    config = AnchorConfig(size=2.0, scales=2, ratios=(3.0,))
    anchors = all_anchors(64, 64, config)
    assert len(anchors) == sum(level_sizes(64, 64, config)) == 2 * (64 + 16 + 4 + 1 + 1)
    width, height = anchors[1, 2:] - anchors[1, :2]
    assert height / width == pytest.approx(3, rel=1e-5)
    assert width * height == pytest.approx((16 * math.sqrt(2)) ** 2, rel=1e-5)


def test_the_last_layer_has_the_anchors_of_all_levels_at_its_positions():
    """The shapes of P3 to P7, each around the centers of C5's cells."""
    config = AnchorConfig(levels="last")
    anchors = all_anchors(70, 96, config)
    assert config.per_cell == 45
    assert level_sizes(70, 96, config) == [len(anchors)] == [45 * 3 * 3]
    cells = anchors.reshape(3, 3, 45, 4)
    centers = (cells[..., :2] + cells[..., 2:]) / 2
    rows, columns = np.mgrid[:3, :3] * 32 + 16
    np.testing.assert_allclose(centers, np.stack([columns, rows], -1)[:, :, None].repeat(45, 2), atol=1e-3)
    shapes = np.concatenate([cell_anchors(stride) for stride in STRIDES])
    np.testing.assert_allclose(cells[1, 2] - [80, 48, 80, 48], shapes, atol=1e-3)


@backends.tensorflow_only
def test_sizes_known_only_to_the_graph():
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((), tf.int32), tf.TensorSpec((), tf.int32)])
    def in_graph(height, width):
        return anchor_boxes(height, width), level_sizes(height, width)

    for height, width in [(64, 96), (100, 33)]:
        anchors, sizes = in_graph(height, width)
        np.testing.assert_array_equal(anchors, all_anchors(height, width))
        assert [int(s) for s in sizes] == level_sizes(height, width)
