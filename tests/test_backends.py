"""The forward model and `fit` on the backend that KERAS_BACKEND names: TensorFlow, JAX or PyTorch."""

import backends
import foreign
import keras
import numpy as np
import pytest
import reference

from retinanet_keras import backbone as backbones
from retinanet_keras import checkpoints, losses

pytestmark = pytest.mark.backends

TRUTH = {
    "boxes": np.float32([[[4, 4, 40, 36], [30, 20, 62, 60]], [[0, 0, 0, 0], [0, 0, 0, 0]]]),
    "labels": np.int32([[0, 2], [-1, -1]]),
}
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype("uint8")


@pytest.mark.parametrize("kind", ["detectron", "torchvision_v2"])
def test_the_forward_model_is_that_of_another_framework(kind, tmp_path):
    """Logits and deltas of released weights, against a network of plain TensorFlow; and detections."""
    weights = getattr(foreign, kind)()
    np.savez(tmp_path / "file.npz", **weights)
    model = checkpoints.load(tmp_path / "file.npz")
    image = np.random.default_rng(1).integers(0, 256, (1, 128, 128, 3)).astype("uint8")
    ours = backends.numpy_of(model(image))
    for name, theirs in zip(("logits", "deltas"), foreign.forward(kind, weights, image), strict=True):
        theirs = foreign.in_that_order(kind, theirs)
        theirs = theirs[..., foreign.COCO_IDS] if theirs.shape[-1] == 91 else theirs
        np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=1e-4 if name == "logits" else 1e-5)
    found = backends.numpy_of(model.detect(image))
    assert found["count"][0] > 50 and (np.diff(found["scores"][0]) <= 0).all()


def test_resnext_is_the_same_network(tmp_path):
    weights = foreign.detectron_imagenet("X101-32x8d", classifier=None)
    np.savez(tmp_path / "file.npz", **weights)
    model, mean = checkpoints.load_backbone(tmp_path / "file.npz")
    image = np.random.default_rng(1).integers(0, 256, (1, 64, 96, 3)).astype("float32")
    ours = backends.numpy_of(model((image - np.float32(mean)) / np.float32(backbones.STD)))
    for name, theirs in zip(("c3", "c4", "c5"), foreign.backbone("detectron", weights, image), strict=True):
        np.testing.assert_allclose(ours[name], theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("normalizer, image_weights", [("image", None), ("minibatch", None), ("image", [0.5, 2.0])])
def test_one_step_is_the_papers(small_model, normalizer, image_weights):
    """The loss, and by the class subnet's bias its gradient, against NumPy: a step of SGD moves it by that."""
    model = small_model(prior=0.1)
    model.compile(keras.optimizers.SGD(0.5), normalizer=normalizer)
    outputs = backends.numpy_of(model(IMAGES))
    anchors = reference.anchors(64, 64)
    total, slopes, divisors = [], [], []
    for b in range(2):
        classes, deltas = reference.assign(anchors, TRUTH["boxes"][b], TRUTH["labels"][b], "detectron")
        one_hot = np.eye(3)[np.maximum(classes, 0)] * (classes >= 0)[:, None]
        used, positive = classes != -2, classes >= 0
        logits, step = np.float64(outputs["logits"][b][used]), 1e-5
        each = reference.focal(logits, one_hot[used]).sum()
        box = reference.smooth_l1(outputs["deltas"][b][positive] - deltas[positive]).sum()
        slope = np.zeros((len(anchors), 3))
        higher, lower = (reference.focal(logits + sign * step, one_hot[used]) for sign in (1, -1))
        slope[used] = (higher - lower) / (2 * step)
        weight = image_weights[b] if image_weights else 1.0
        total.append(weight * (each + box))
        slopes.append(weight * slope.reshape(-1, 9 * 3).sum(axis=0))  # of the channels a * K + k
        assigned = reference.assigned(anchors, TRUTH["boxes"][b], TRUTH["labels"][b])
        divisors.append(max(positive.sum(), 1) if normalizer == "image" else assigned + 1)
    if normalizer == "image":
        loss = np.mean([value / divisor for value, divisor in zip(total, divisors, strict=True)])
        slope = sum(value / divisor for value, divisor in zip(slopes, divisors, strict=True)) / 2
    else:
        loss, slope = sum(total) / sum(divisors), sum(slopes) / sum(divisors)
    before = backends.numpy_of(model.class_subnet.final.bias)
    weights = image_weights and np.float32(image_weights)
    history = model.fit(IMAGES, TRUTH, sample_weight=weights, batch_size=2, verbose=0).history
    assert history["loss"][0] == pytest.approx(loss, rel=1e-4)
    moved = before - backends.numpy_of(model.class_subnet.final.bias)
    np.testing.assert_allclose(moved, 0.5 * slope, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("loss", [None, losses.FocalStarLoss(), losses.CrossEntropyLoss(0.3)])
def test_fit_lowers_the_loss_and_predict_detects(small_model, loss):
    model = small_model()
    model.compile(keras.optimizers.Adam(1e-3), loss)
    history = model.fit(IMAGES, TRUTH, batch_size=2, epochs=4, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] and np.isfinite(history["loss"]).all()
    assert history["positives"][0] > 1
    found = model.predict(IMAGES, verbose=0)
    assert found["boxes"].shape == (2, 100, 4) and (found["labels"][0, found["count"][0] :] == -1).all()


def test_no_images_have_no_detections(small_model):
    model = small_model()
    for found in (model.detect(IMAGES[:0]), model.predict(IMAGES[:0], verbose=0)):
        shapes = {name: value.shape for name, value in backends.numpy_of(found).items()}
        assert shapes == {"boxes": (0, 100, 4), "scores": (0, 100), "labels": (0, 100), "count": (0,)}
