"""Detections as arrays: the numbers of the file, the file itself, and the way back."""

import json

import numpy as np
import pytest

from retinanet_keras.data.coco import Categories
from retinanet_keras.errors import DataError
from retinanet_keras.evaluation import results
from retinanet_keras.evaluation.coco_metrics import coco_metrics, to_results
from retinanet_keras.evaluation.results import ImageDetections, Records

pytestmark = pytest.mark.check

ANIMALS = Categories((3, 90), ("ant", "bee"))


def filled(images=4, seed=0):
    """(Records, the same as dicts) of random detections; image 1 has none."""
    rng = np.random.default_rng(seed)
    of, dicts = Records(), []
    for i in range(images):
        n = 0 if i == 1 else 50
        boxes = np.sort(rng.uniform(0, 900, (n, 2, 2)), axis=1).reshape(n, 4).astype("float32")
        one = (np.int64(i + 10), boxes, rng.random(n).astype("float32"), rng.integers(-1, 2, n))
        of.append(ImageDetections(*one), ANIMALS)
        dicts += to_results(*one, ANIMALS)
    return of, dicts


def test_numbers_are_the_shortest_decimals_of_their_float32():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    ties = np.arange(1, 60_000, 2) * 19.53125  # two decimals are equally near: 1035.15625
    values = np.concatenate([
        bits[np.isfinite(bits)], rng.random(20_000), rng.uniform(-10, 2000, 20_000).round(2), ties,
        10.0 ** -np.arange(45), [0, -0.0, 0.1, 1 / 3, 2**23, 2**23 + 1, 2**24 + 2, 1e10, 4194304.25],
    ]).astype("float32")  # fmt: skip
    assert results.shortest(values).tolist() == [float(str(v)) for v in values]
    assert results.shortest(np.zeros((0, 4))).shape == (0, 4)


def test_the_file_is_the_json_of_the_dicts(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "CHUNK", 7)  # several writes
    of, dicts = filled()
    of.write(tmp_path / "new/results.json")
    assert (tmp_path / "new/results.json").read_text() == json.dumps(dicts, separators=(",", ":"))
    Records().write(tmp_path / "new/results.json")
    assert (tmp_path / "new/results.json").read_text() == "[]"


def test_the_file_read_again_is_equal(tmp_path):
    of, dicts = filled()
    of.write(tmp_path / "results.json")
    again = Records.from_json(tmp_path / "results.json")
    assert len(again) == len(of) == len(dicts) and again.to_list() == of.to_list() == dicts
    assert again.image_ids == [10, 12, 13] and set(again.category_ids) == {3, 90}


def test_ids_may_be_text_with_anything_in_it(tmp_path):
    dicts = [
        {"image_id": i, "category_id": 'b"\\', "bbox": [0.0, 1.0, 2.0, 3.5], "score": 0.5} for i in ("é\n", 7, "7")
    ]
    Records.from_json(dicts).write(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == dicts


def test_detections_of_an_image_are_those_given():
    boxes = np.array([[10.25, 20, 30.5, 60], [1 / 3, 2, 40, 90], [0, 0, 0, 0]], "float32")
    of = filled()[0]
    of.append(ImageDetections("late", boxes, [0.9, 0.7, 0], [1, 0, -1]), ANIMALS)
    of.append(ImageDetections(10, boxes[:1], [0.25], [1]), ANIMALS)  # an image may come in parts
    found, scores, labels = of.of_image("late", ANIMALS)
    assert found == pytest.approx(boxes[:2], rel=1e-6) and labels.tolist() == [1, 0]
    assert (scores == np.float32([0.9, 0.7])).all()
    found, scores, labels = of.of_image(np.int64(10), ANIMALS)
    assert (found[-1] == boxes[0]).all() and (scores[-1], labels[-1]) == (0.25, 1) and len(found) > 10
    for without in (11, "never seen"):
        assert [part.shape for part in of.of_image(without, ANIMALS)] == [(0, 4), (0,), (0,)]
    with pytest.raises(DataError, match="image 'late' has a detection of category 90, which is none of the 1"):
        of.of_image("late", Categories((3,), ("ant",)))


def test_scores_in_memory_are_those_of_the_file(tmp_path):
    of, dicts = filled()
    truth = {
        "images": [{"id": i} for i in range(10, 14)],
        "categories": [{"id": 3, "name": "ant"}, {"id": 90, "name": "bee"}],
        "annotations": [{**d, "bbox": [d["bbox"][0] + 0.3, *d["bbox"][1:]]} for d in dicts[::5]],
    }
    of.write(tmp_path / "results.json")
    metrics = coco_metrics(truth, of)
    assert 0 < metrics["AP"] < 1 and metrics == coco_metrics(truth, dicts) == coco_metrics(
        truth, tmp_path / "results.json"
    )


def test_a_failed_append_adds_nothing():
    of = Records()
    for boxes, labels in (([[0, 0, 1, np.nan]], [0]), ([[0, 0, 1, 1]], [2]), ([[0, 0, 1, 1]], [0, 1])):
        with pytest.raises(DataError, match="Image 5"):
            of.append(ImageDetections(5, boxes, [0.5], labels), ANIMALS)
    assert len(of) == 0 and of.image_ids == []


@pytest.mark.parametrize("value", [10**400, "9", True, None, [1]])
def test_entries_that_are_no_numbers_are_named(value):
    good = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9], "score": 1}
    assert len(Records.from_json([good, {**good, "bbox": (0, 0.5, np.float32(9), 9)}])) == 2
    with pytest.raises(DataError, match="entry 1: expected score as a finite number"):
        Records.from_json([good, {**good, "score": value}])
    with pytest.raises(DataError, match="entry 1: expected bbox as"):
        Records.from_json([good, {**good, "bbox": [0, 0, value, 9]}])
