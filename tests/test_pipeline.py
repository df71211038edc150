"""Resizing, the canvas, augmentation and the order of training, against hand-worked numbers."""

import collections

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from retinanet_keras.config import config_from_dict
from retinanet_keras.data import coco, pipeline
from retinanet_keras.model import PAD_COLOR

PLAIN = config_from_dict({"data": {"short_side": 64, "max_side": 96, "flip": 0.0}}).data


def settings(**changes):
    return config_from_dict({"data": {"short_side": 64, "max_side": 96, "flip": 0.0, **changes}}).data


@pytest.fixture
def dataset(tmp_path):
    """Seven images, five landscape and two portrait, with 0 to 3 boxes each, one gradient picture apiece."""
    sizes = [(64, 96), (48, 96), (96, 64), (64, 64), (128, 160), (100, 80), (60, 80)]
    files, boxes, counts = [], [], [1, 2, 0, 3, 1, 1, 2]
    for i, (height, width) in enumerate(sizes):
        ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(ramp.astype("uint8")).save(files[-1])
        boxes += [[5 + 3 * j, 4, 30 + 3 * j, 40 + j] for j in range(counts[i])]
    return coco.CocoDataset(
        categories=coco.Categories((1, 2), ("a", "b")), image_ids=np.arange(10, 17), files=tuple(files),
        sizes=np.array(sizes, "int32"), offsets=np.cumsum([0, *counts]), boxes=np.array(boxes, "float32"),
        labels=np.arange(len(boxes), dtype="int32") % 2, annotation_file="",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("size", "expected", "scale"),
    [
        ((480, 640), (800, 1067), 800 / 480),
        ((640, 480), (1067, 800), 800 / 480),
        ((400, 1000), (533, 1333), 1.333),  # the cap on the longer side decides
        ((1, 1), (800, 800), 800.0),
        ((200, 6000), (44, 1333), 1333 / 6000),
        ((1, 5000), (1, 1333), 1333 / 5000),  # never less than one pixel
        ((800, 1333), (800, 1333), 1.0),
    ],
)
def test_resized(size, expected, scale):
    target, factor = pipeline.resized(np.array(size), 800, 1333)
    assert tuple(target.numpy()) == expected
    np.testing.assert_allclose(factor, scale, rtol=1e-6)


def test_fit_pads_right_and_bottom_with_the_mean_colour():
    image = np.full((1, 50, 70, 3), 200, "uint8")
    canvas, size, scale = pipeline.fit(image, 50, 100)
    assert canvas.shape == (1, 64, 96, 3) and tuple(size.numpy()) == (50, 70) and scale == 1.0
    assert (canvas[0, :50, :70].numpy() == 200).all()
    assert (canvas[0, 50:].numpy() == PAD_COLOR).all() and (canvas[0, :, 70:].numpy() == PAD_COLOR).all()


def test_fit_samples_at_pixel_centres():
    """Doubling a ramp: new pixels lie a quarter of the way between old ones."""
    image = np.array([0, 40, 80, 120], "uint8")[None, None, :, None] * np.ones((1, 4, 1, 3), "uint8")
    canvas, _, _ = pipeline.fit(image, 8, 8)
    assert canvas[0, 4, :8, 0].numpy().tolist() == [0, 10, 30, 50, 70, 90, 110, 120]


def test_to_original_is_the_inverse_of_the_resize():
    _, size, scale = pipeline.fit(np.zeros((1, 120, 200, 3), "uint8"), 60, 90)
    box = np.array([[[20.0, 30, 100, 90], [-5, -5, 1000, 1000]]], "float32")
    back = pipeline.to_original(box * scale, scale, [120, 200]).numpy()
    np.testing.assert_allclose(back[0, 0], box[0, 0], rtol=1e-6)
    assert back[0, 1].tolist() == [0, 0, 200, 120]


def test_inference_batches_hold_one_canvas_each_and_every_image_once(dataset):
    seen = {}
    for images, info in pipeline.inference_batches(dataset, PLAIN, batch_size=2):
        assert len(images) <= 2
        for i, image_id in enumerate(info["image_id"].numpy()):
            seen[image_id] = images.shape[1:3], tuple(info["size"][i].numpy()), tuple(info["original_size"][i].numpy())
    assert set(seen) == set(dataset.image_ids)
    assert seen[11] == ((64, 96), (48, 96), (48, 96))  # capped
    assert seen[15] == ((96, 64), (80, 64), (100, 80))  # portrait, 0.8 of its size
    assert seen[14] == ((64, 96), (64, 80), (128, 160))


def test_training_order_is_a_function_of_the_step(dataset):
    order, again = (pipeline.TrainingOrder(dataset.sizes, 2, seed=3) for _ in range(2))
    assert order.steps_per_epoch == 4  # five landscape images make three batches, two portrait ones make one
    later = [again.batch(step).tolist() for step in (7, 2, 5)]  # in any order
    assert later == [order.batch(step).tolist() for step in (7, 2, 5)]
    portrait = dataset.sizes[:, 0] > dataset.sizes[:, 1]
    for epoch in range(3):
        batches = order.epoch(epoch)
        assert set(batches.ravel()) == set(range(7))
        assert max(collections.Counter(batches.ravel().tolist()).values()) <= 2
        assert all(len(set(portrait[batch])) == 1 for batch in batches)
    assert order.epoch(0).tolist() != order.epoch(1).tolist()
    assert order.epoch(0).tolist() != pipeline.TrainingOrder(dataset.sizes, 2, seed=4).epoch(0).tolist()


def test_a_set_smaller_than_a_batch_is_repeated(dataset):
    order = pipeline.TrainingOrder(dataset.subset([0, 1, 3]).sizes, 8, seed=0)
    assert order.steps_per_epoch == 1 and set(order.batch(0)) == {0, 1, 2} and len(order.batch(0)) == 8


def test_training_canvases_are_the_smallest_that_hold_all(dataset):
    canvases = pipeline.training_canvases(dataset.sizes, PLAIN)
    assert canvases.tolist() == [[64, 96], [96, 64]]


def test_training_batches_have_the_contracts_form(dataset):
    images, truth = next(iter(pipeline.training_batches(dataset, PLAIN, batch_size=2, seed=0)))
    assert images.dtype == tf.uint8 and tuple(images.shape) in {(2, 64, 96, 3), (2, 96, 64, 3)}
    assert truth["boxes"].shape == (2, 3, 4) and truth["labels"].shape == (2, 3)  # 3 boxes is the most of one image
    for i, image_id in enumerate(truth["image_id"].numpy()):
        row = image_id - 10
        n = len(dataset.labels_of(row))
        scale = truth["scale"][i].numpy()
        np.testing.assert_allclose(truth["boxes"][i, :n], dataset.boxes_of(row) * scale, rtol=1e-5)
        assert truth["labels"][i].numpy().tolist() == [*dataset.labels_of(row), *[-1] * (3 - n)]
        assert not truth["boxes"][i, n:].numpy().any()


def test_batches_from_a_later_step_are_those_of_an_uninterrupted_run(dataset):
    config = settings(flip=0.5, vertical_flip=0.5, scale_jitter=[0.8, 1.3], aspect_jitter=1.2, color_jitter=0.2)
    make = lambda start: iter(pipeline.training_batches(dataset, config, batch_size=2, seed=5, start=start))  # noqa: E731
    whole, late = make(0), make(6)
    expected = [next(whole) for _ in range(9)][6:]
    for images, truth in expected:
        other_images, other_truth = next(late)
        np.testing.assert_array_equal(images, other_images)
        assert all(np.array_equal(truth[key], other_truth[key]) for key in truth)


def augmented(config, seed=0, image=None, boxes=((10, 8, 30, 40),)):
    image = np.zeros((64, 96, 3), "uint8") if image is None else image
    truth = {"boxes": tf.constant(boxes, tf.float32), "labels": tf.range(len(boxes))}
    return pipeline.augment(tf.constant(image), truth, tf.constant([64, 96]), config, tf.constant([1, seed], tf.int64))


def bright_box(pixels):
    """The bounding box of what is brighter than 250, x1, y1, x2, y2."""
    y, x = np.nonzero(np.asarray(pixels)[..., 0] > 250)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


@pytest.mark.parametrize("changes", [{"flip": 1.0}, {"vertical_flip": 1.0}, {"flip": 1.0, "vertical_flip": 1.0}])
def test_flips_move_pixels_and_boxes_alike(changes):
    image = np.zeros((64, 96, 3), "uint8")
    image[8:40, 10:30] = 255
    pixels, truth = augmented(settings(**changes), image=image)
    assert truth["boxes"].numpy()[0].tolist() == bright_box(pixels)
    assert truth["boxes"].numpy()[0].tolist() != [10, 8, 30, 40]


def test_a_flip_leaves_the_padding_right_and_bottom():
    pixels, truth = augmented(settings(flip=1.0, vertical_flip=1.0), image=np.zeros((60, 64, 3), "uint8"))
    assert tuple(truth["size"].numpy()) == (64, 68)
    assert (pixels.numpy()[:, 68:] == PAD_COLOR).all() and not pixels.numpy()[:, :68].any()


def test_zoom_moves_pixels_and_boxes_alike():
    image = np.zeros((128, 192, 3), "uint8")  # to be halved
    image[40:80, 60:120] = 255
    config = settings(scale_jitter=[0.7, 1.3], aspect_jitter=1.2)
    sides = set()
    for seed in range(20):
        pixels, truth = augmented(config, seed, image, boxes=((60, 40, 120, 80),))
        if truth["labels"].numpy()[0] < 0:
            continue
        box = truth["boxes"].numpy()[0]
        np.testing.assert_allclose(box, bright_box(pixels), atol=1.5)  # the bright edge is a pixel of ramp
        sides.add(round(float(box[2] - box[0]), 3))
    assert len(sides) > 10  # it does zoom


def test_boxes_cropped_away_become_padding():
    config = settings(scale_jitter=[3.0, 3.0])
    boxes = tuple((x, y, x + 10, y + 10) for x in (0, 20, 40, 60, 80) for y in (0, 25, 50))
    kept = []
    for seed in range(10):
        _, truth = augmented(config, seed, boxes=boxes)
        labels, found = truth["labels"].numpy(), truth["boxes"].numpy()
        n = int((labels >= 0).sum())
        kept.append(n)
        assert (labels[:n] >= 0).all() and (labels[n:] == -1).all() and not found[n:].any()
        assert (found >= 0).all() and (found <= [96, 64, 96, 64]).all()
        share = (found[:n, 2] - found[:n, 0]) * (found[:n, 3] - found[:n, 1]) / (30 * 30)
        # Cropping whole pixels, some 21 by 32 here, changes the scale of 3 by up to a twentieth on an axis.
        assert (share >= 0.9 * pipeline.MIN_VISIBLE).all()
    assert 0 < min(kept) and max(kept) < len(boxes)


def test_colour_jitter_shifts_within_its_range():
    shifts = []
    for seed in range(20):
        pixels, _ = augmented(settings(color_jitter=0.1), seed, image=np.full((64, 96, 3), 128, "uint8"))
        assert len(np.unique(pixels.numpy().reshape(-1, 3), axis=0)) == 1
        shifts.append(pixels.numpy()[0, 0].astype(int) - 128)
    assert np.abs(shifts).max() <= np.ceil(1.5 * 25.5) and np.ptp(shifts) > 20


def test_an_image_of_another_size_than_annotated_stops_the_stream(dataset):
    Image.new("RGB", (50, 50)).save(dataset.files[0])
    with pytest.raises(tf.errors.InvalidArgumentError, match="differ in size"):
        for _, _ in zip(range(4), pipeline.training_batches(dataset, PLAIN, batch_size=2, seed=0), strict=False):
            pass
