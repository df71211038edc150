"""Resizing, the canvas, augmentation and the order of training, against hand-worked numbers."""

import collections
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from retinanet_keras.config import config_from_dict
from retinanet_keras.data import augmentation, buckets, canvas, coco, inference_batches, training_batches
from retinanet_keras.errors import ConfigError
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
    target, factor = canvas.resized(np.array(size), 800, 1333)
    assert tuple(target.numpy()) == expected
    np.testing.assert_allclose(factor, scale, rtol=1e-6)


def test_fit_pads_right_and_bottom_with_the_mean_color():
    image = np.full((1, 50, 70, 3), 200, "uint8")
    padded, size, scale = canvas.fit(image, 50, 100)
    assert padded.shape == (1, 64, 96, 3) and tuple(size.numpy()) == (50, 70) and scale == 1.0
    assert (padded[0, :50, :70].numpy() == 200).all()
    assert (padded[0, 50:].numpy() == PAD_COLOR).all() and (padded[0, :, 70:].numpy() == PAD_COLOR).all()


def test_fit_samples_at_pixel_centers():
    """Doubling a ramp: new pixels lie a quarter of the way between old ones."""
    image = np.array([0, 40, 80, 120], "uint8")[None, None, :, None] * np.ones((1, 4, 1, 3), "uint8")
    padded, _, _ = canvas.fit(image, 8, 8)
    assert padded[0, 4, :8, 0].numpy().tolist() == [0, 10, 30, 50, 70, 90, 110, 120]


def test_to_original_is_the_inverse_of_the_resize():
    _, size, scale = canvas.fit(np.zeros((1, 120, 200, 3), "uint8"), 60, 90)
    box = np.array([[[20.0, 30, 100, 90], [-5, -5, 1000, 1000]]], "float32")
    back = canvas.to_original(box * scale, scale, [120, 200]).numpy()
    np.testing.assert_allclose(back[0, 0], box[0, 0], rtol=1e-6)
    assert back[0, 1].tolist() == [0, 0, 200, 120]


def test_inference_batches_hold_one_canvas_each_and_every_image_once(dataset):
    seen = {}
    plan = inference_batches.inference_plan(dataset.sizes, 2, PLAIN)
    for indices, (images, info) in zip(plan, inference_batches.inference_batches(dataset, plan, PLAIN), strict=True):
        assert len(images) <= 2 and info["image_id"].numpy().tolist() == dataset.image_ids[indices].tolist()
        for i, image_id in enumerate(info["image_id"].numpy()):
            seen[image_id] = images.shape[1:3], tuple(info["size"][i].numpy()), tuple(info["original_size"][i].numpy())
    assert set(seen) == set(dataset.image_ids)
    assert seen[11] == ((64, 96), (48, 96), (48, 96))  # capped
    assert seen[15] == ((96, 64), (80, 64), (100, 80))  # portrait, 0.8 of its size
    assert seen[14] == ((64, 96), (64, 80), (128, 160))


def test_training_order_is_a_function_of_the_step(dataset):
    bucket = (dataset.sizes[:, 0] > dataset.sizes[:, 1]).astype(int)
    order, again = (buckets.TrainingOrder(bucket, 2, seed=3) for _ in range(2))
    assert order.steps_per_epoch == 4  # five landscape images make three batches, two portrait ones make one
    later = [again.batch(step).tolist() for step in (7, 2, 5)]  # in any order
    assert later == [order.batch(step).tolist() for step in (7, 2, 5)]
    for epoch in range(3):
        batches = order.epoch(epoch)
        assert set(batches.ravel()) == set(range(7))
        assert max(collections.Counter(batches.ravel().tolist()).values()) <= 2
        assert all(len(set(bucket[batch])) == 1 for batch in batches)
    assert order.epoch(0).tolist() != order.epoch(1).tolist()
    assert order.epoch(0).tolist() != buckets.TrainingOrder(bucket, 2, seed=4).epoch(0).tolist()


def test_a_set_smaller_than_a_batch_is_repeated():
    order = buckets.TrainingOrder(np.zeros(3, int), 8, seed=0)
    assert order.steps_per_epoch == 1 and set(order.batch(0)) == {0, 1, 2} and len(order.batch(0)) == 8


@pytest.mark.parametrize(
    ("count", "canvases", "of_images"),
    [
        (1, [[96, 96]], [0] * 7),
        (2, [[64, 96], [96, 64]], [0, 0, 1, 0, 0, 1, 0]),
        (3, [[64, 96], [96, 64]], [0, 0, 1, 0, 0, 1, 0]),  # two squarish images are too few for a canvas of their own
    ],
)
def test_training_canvases_are_the_smallest_that_hold_all(dataset, count, canvases, of_images):
    found, bucket = training_batches.training_canvases(dataset.sizes, settings(buckets=count))
    assert found.tolist() == canvases and bucket.tolist() == of_images


@pytest.mark.parametrize(
    ("squares", "count", "canvases", "images"),
    [
        (64, 2, [[64, 128], [128, 64]], [164, 80]),
        (64, 3, [[64, 128], [128, 64], [64, 64]], [100, 80, 64]),  # squares count as landscape
        (63, 3, [[64, 128], [128, 64]], [163, 80]),  # fewer than 64 make no bucket
        (64, 8, [[64, 128], [128, 64], [64, 64]], [100, 80, 64]),  # nothing left to save
        (64, 1, [[128, 128]], [244]),
    ],
)
def test_a_third_canvas_is_where_it_saves_most(squares, count, canvases, images):
    fitted = np.repeat([[64, 128], [128, 64], [64, 64]], [100, 80, squares], axis=0)
    found, bucket = buckets.divide(fitted, fitted[:, 0] > fitted[:, 1], count)
    assert found.tolist() == canvases and np.bincount(bucket).tolist() == images


def pixels_of(fitted, *parts):
    return sum(len(fitted[part]) * int(fitted[part].max(axis=0, initial=0).prod()) for part in parts)


def test_a_split_needs_the_fewest_pixels_of_all_divisions_in_two():
    rng = np.random.default_rng(0)
    unsplit = 0
    for _ in range(60):
        fitted = 32 * rng.integers(1, rng.integers(3, 8), (rng.integers(1, 9), 2))
        every = np.arange(2 ** (len(fitted) - 1))[:, None] >> np.arange(len(fitted)) & 1 > 0  # the first is none
        fewest = min(pixels_of(fitted, ~second, second) for second in every)
        second = buckets.split(fitted)
        unsplit += second is None
        assert fewest == (pixels_of(fitted, slice(None)) if second is None else pixels_of(fitted, ~second, second))
        large = buckets.split(fitted, smallest=3)
        assert large is None or (3 <= large.sum() <= len(fitted) - 3 and pixels_of(fitted, ~large, large) >= fewest)
    assert 0 < unsplit < 60


def test_every_image_fits_its_training_canvas():
    sizes = np.random.default_rng(0).integers(50, 700, (2000, 2))
    config = settings(buckets=5, short_side=256, max_side=400)
    canvases, bucket = training_batches.training_canvases(sizes, config)
    fitted = canvas.resized(sizes, config.short_side, config.max_side)[0].numpy()
    assert len(canvases) == 5 and (fitted <= canvases[bucket]).all() and (canvases % 32 == 0).all()
    portrait = sizes[:, 0] > sizes[:, 1]
    assert all(len(set(portrait[bucket == b])) == 1 for b in range(5))


def test_training_batches_have_the_contracts_form(dataset):
    images, truth = next(iter(training_batches.training_batches(dataset, PLAIN, batch_size=2, seed=0)))
    assert images.dtype == tf.uint8 and tuple(images.shape) in {(2, 64, 96, 3), (2, 96, 64, 3)}
    assert truth["boxes"].shape == (2, 3, 4) and truth["labels"].shape == (2, 3)  # 3 boxes is the most of one image
    for i, image_id in enumerate(truth["image_id"].numpy()):
        row = image_id - 10
        n = len(dataset.labels_of(row))
        scale = truth["scale"][i].numpy()
        np.testing.assert_allclose(truth["boxes"][i, :n], dataset.boxes_of(row) * scale, rtol=1e-5)
        assert truth["labels"][i].numpy().tolist() == [*dataset.labels_of(row), *[-1] * (3 - n)]
        assert not truth["boxes"][i, n:].numpy().any()


RANDOM = {"flip": 0.5, "vertical_flip": 0.5, "scale_jitter": [0.8, 1.3], "aspect_jitter": 1.2, "color_jitter": 0.2}


def batches(dataset, config, count, **arguments):
    """The first `count` batches, NumPy, the images among the truth as "images"."""
    stream = training_batches.training_batches(dataset, config, **{"batch_size": 4, "seed": 5, **arguments})
    return [{"images": images, **truth} for images, truth in stream.take(count).as_numpy_iterator()]


def assert_equal_batches(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], key)


@pytest.mark.parametrize("changes", [
    pytest.param({}, marks=pytest.mark.slow), pytest.param({"decode": "reduced"}, marks=pytest.mark.slow),
    {"bad_images": "skip"}, pytest.param({"buckets": 1}, marks=pytest.mark.slow),
])  # fmt: skip
def test_batches_from_a_later_step_are_those_of_an_uninterrupted_run(dataset, changes):
    if "bad_images" in changes:
        Path(dataset.files[4]).write_bytes(b"no image")
    config = settings(**{**RANDOM, **changes})
    assert_equal_batches(batches(dataset, config, 3, start=4), batches(dataset, config, 7)[4:])


def test_a_batch_that_does_not_divide_is_refused(dataset):
    with pytest.raises(ConfigError, match="train.batch_size: 6 images .* expected a multiple of 4"):
        training_batches.training_batches(dataset, settings(), batch_size=6, seed=0, share=(0, 2), parts=2)


@pytest.mark.parametrize(
    ("workers", "parts"),
    [pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(1, 4, marks=pytest.mark.slow), (2, 2)],
)
def test_shares_and_parts_are_the_same_stream(dataset, workers, parts):
    Path(dataset.files[0]).write_bytes(b"no image")
    config = settings(**RANDOM, bad_images="skip")
    whole = batches(dataset, config, 5)
    shares = [batches(dataset, config, 3 * parts, start=2, share=(i, workers), parts=parts) for i in range(workers)]
    assert all(len(element["images"]) == 4 // workers // parts for share in shares for element in share)
    steps = []
    for step in range(3):
        elements = [element for share in shares for element in share[step * parts : (step + 1) * parts]]
        steps.append({key: np.concatenate([element[key] for element in elements]) for key in elements[0]})
    assert_equal_batches(steps, whole[2:])


def test_a_batch_that_cannot_be_shared_evenly_is_refused(dataset):
    with pytest.raises(ConfigError, match="16 images.* 3 workers .* 2 replicas .* multiple of 6"):
        training_batches.training_batches(dataset, PLAIN, batch_size=16, seed=0, share=(0, 3), parts=2)


def test_produced_is_called_once_for_each_batch(dataset):
    calls = []
    batches(dataset, PLAIN, 12, parts=2, produced=lambda: calls.append(None))
    assert 12 <= len(calls) <= 12 + 2 * 2 + 1  # two steps are prepared ahead


def test_skipped_images_are_told_and_replaced_from_their_bucket(dataset):
    Path(dataset.files[4]).write_bytes(b"no image")
    Image.new("RGB", (50, 50)).save(dataset.files[2])
    told = []
    config = settings(bad_images="skip")
    found = batches(dataset, config, 12, skipped=lambda *args: told.append(args))
    order = buckets.TrainingOrder(training_batches.training_canvases(dataset.sizes, config)[1], 4, seed=5)
    replaced = collections.defaultdict(set)
    for step, batch in enumerate(found):
        for planned, seen in zip(order.batch(step), batch["image_id"] - 10, strict=True):
            if planned in (2, 4):
                replaced[planned].add(seen)
            else:
                assert seen == planned
    assert replaced[2] == {5}  # the only other portrait
    assert len(replaced[4]) > 1 and replaced[4] <= {0, 1, 3, 6}
    assert {index for index, _ in told} == {2, 4}
    assert len(told) >= sum((order.batch(step) == bad).sum() for step in range(12) for bad in (2, 4))
    messages = dict(told)
    assert dataset.files[4] in messages[4] and "cannot be read" in messages[4]
    assert "is 50x50 (height x width), its annotation says 96x64" in messages[2]


def test_an_image_is_fatal_when_its_replacements_cannot_be_used_either(dataset):
    for file in dataset.files:
        Image.new("RGB", (50, 50)).save(file)
    told = []
    with pytest.raises(tf.errors.InvalidArgumentError, match="differ in size"):
        batches(dataset, settings(bad_images="skip"), 1, batch_size=1, skipped=lambda *args: told.append(args))
    assert len(told) >= 3


@pytest.mark.parametrize(
    ("size", "changes", "halvings"),
    [
        ((128, 192), {}, 1),
        ((127, 191), {}, 0),  # shrunk by less than 2
        ((100, 384), {}, 2),  # the longer side decides
        ((600, 600), {}, 3),
        ((5000, 5000), {}, 3),  # 1/8 is the least there is
        ((128, 192), {"scale_jitter": [0.5, 1.1]}, 0),
        ((256, 384), {"aspect_jitter": 1.44}, 1),  # one side may be stretched by 1.2
    ],
)
def test_decoding_is_reduced_as_far_as_no_pixel_is_missed(size, changes, halvings):
    assert training_batches.reducible(np.array([size]), settings(**changes)).tolist() == [halvings]


@pytest.fixture
def photograph(tmp_path):
    """One JPEG of 321 x 481 pixels, a bright box on a gradient, to be shrunk to 64 x 96."""
    y, x = np.mgrid[:321, :481]
    image = np.stack([x / 4, y / 3, (x + y) / 8], axis=-1)
    image[64:240, 80:320] = 255
    Image.fromarray(image.astype("uint8")).save(tmp_path / "photo.jpg", quality=95)
    return coco.CocoDataset(
        categories=coco.Categories((1,), ("a",)), image_ids=np.array([1]), files=(str(tmp_path / "photo.jpg"),),
        sizes=np.array([[321, 481]], "int32"), offsets=np.array([0, 1]),
        boxes=np.array([[80, 64, 320, 240]], "float32"), labels=np.zeros(1, "int32"), annotation_file="",
    )  # fmt: skip


@pytest.mark.parametrize("jitter", [[1.0, 1.0], [0.8, 1.0]])
def test_reduced_decoding_keeps_boxes_and_nearly_all_pixels(photograph, jitter):
    exact, reduced = (
        batches(photograph, settings(scale_jitter=jitter, decode=decode), 2) for decode in ("exact", "reduced")
    )
    for one, other in zip(exact, reduced, strict=True):
        np.testing.assert_allclose(one["boxes"], other["boxes"], atol=1e-3)
        assert (one["scale"] == other["scale"]).all() and (one["size"] == other["size"]).all()
        difference = np.abs(one["images"].astype(float) - other["images"])
        # Of 255. At the box's edges one takes a sample where the other has a mean.
        assert 0 < np.quantile(difference, 0.94) <= 4 and np.median(difference) <= 1
    if jitter == [1.0, 1.0]:  # 64 / 321 times 80, 64, 320, 240
        np.testing.assert_allclose(reduced[0]["boxes"][0, 0], [15.950, 12.760, 63.801, 47.850], atol=1e-3)


def test_reduced_decoding_moves_pixels_and_boxes_alike_when_zoomed(photograph):
    sides = set()
    config = settings(scale_jitter=[0.8, 1.2], aspect_jitter=1.2, decode="reduced")
    for batch in batches(photograph, config, 5):
        for pixels, box in zip(batch["images"], batch["boxes"][:, 0], strict=True):
            np.testing.assert_allclose(box, bright_box(pixels), atol=1.5)
            sides.add(round(float(box[2] - box[0]), 3))
    assert len(sides) > 10


def test_reduced_decoding_leaves_other_files_than_jpegs_alone(dataset):
    assert training_batches.reducible(dataset.sizes, PLAIN).any()
    assert_equal_batches(batches(dataset, settings(decode="reduced"), 4), batches(dataset, PLAIN, 4))


def test_reduced_decoding_checks_the_size(photograph):
    Image.new("RGB", (481, 301)).save(photograph.files[0])
    with pytest.raises(tf.errors.InvalidArgumentError, match="differ in size"):
        batches(photograph, settings(decode="reduced"), 1)


def augmented(config, seed=0, image=None, boxes=((10, 8, 30, 40),), canvas=(64, 96)):
    image = np.zeros((64, 96, 3), "uint8") if image is None else image
    truth = {"boxes": tf.constant(boxes, tf.float32), "labels": tf.range(len(boxes))}
    size, seed = tf.constant(image.shape[:2]), tf.constant([1, seed], tf.int64)
    return training_batches.augment(tf.constant(image), size, truth, tf.constant(canvas), config, seed)


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


@pytest.mark.parametrize("size", [(1000, 1507), (1507, 1000), (300, 900), (50, 70)])
def test_shrinking_crops_nothing_keeps_the_cap_and_pads_right_and_bottom(size):
    """1507 x 0.064 is 96.4, which is rounded to 96, the canvas's side: the last 7 columns must not be lost to it."""
    config = config_from_dict({"data": {"short_side": 64, "max_side": 150, "scale_jitter": [0.8, 1.0], "flip": 0}}).data
    fitted, base = canvas.resized(np.array(size), 64, 150)
    (height, width), fitted, base = size, fitted.numpy(), float(base)
    boxes = ((0, 0, width, height), (0, 0, width / 2, height), (0, height / 2, width, height))
    factors = []
    for seed in range(12):
        pixels, truth = augmented(config, seed, np.full((*size, 3), 255, "uint8"), boxes, canvas.padded(fitted))
        (x1, y1, x2, y2), left, lower = truth["boxes"].numpy()
        assert truth["size"].numpy().tolist() == bright_box(pixels)[:1:-1] and bright_box(pixels)[:2] == [0, 0]
        np.testing.assert_allclose([x1, y1, x2, y2], bright_box(pixels), atol=0.51)  # sizes are whole pixels
        np.testing.assert_allclose(left, [x1, y1, (x1 + x2) / 2, y2], atol=1e-3)  # all columns are there
        np.testing.assert_allclose(lower, [x1, (y1 + y2) / 2, x2, y2], atol=1e-3)  # all rows are there
        factors.append(float(truth["scale"]) / base)
        np.testing.assert_allclose([y2 - y1, x2 - x1], fitted * factors[-1], atol=0.51)
    assert 0.8 <= min(factors) < 0.9 < max(factors) <= 1.0


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
        assert (share >= 0.9 * augmentation.MIN_VISIBLE).all()
    assert 0 < min(kept) and max(kept) < len(boxes)


def test_color_jitter_shifts_within_its_range():
    shifts = []
    for seed in range(20):
        pixels, _ = augmented(settings(color_jitter=0.1), seed, image=np.full((64, 96, 3), 128, "uint8"))
        assert len(np.unique(pixels.numpy().reshape(-1, 3), axis=0)) == 1
        shifts.append(pixels.numpy()[0, 0].astype(int) - 128)
    assert np.abs(shifts).max() <= np.ceil(1.5 * 25.5) and np.ptp(shifts) > 20


def test_an_image_of_another_size_than_annotated_stops_the_stream(dataset):
    Image.new("RGB", (50, 50)).save(dataset.files[0])
    with pytest.raises(tf.errors.InvalidArgumentError, match="differ in size"):
        for _, _ in zip(
            range(4), training_batches.training_batches(dataset, PLAIN, batch_size=2, seed=0), strict=False
        ):
            pass
