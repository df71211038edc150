"""Evaluation: hand-worked numbers, pycocotools called directly, and every way its input can be wrong."""

import contextlib
import copy
import io
import json
import os

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinanet_keras.data.coco import Categories, DataError
from retinanet_keras.results import evaluation
from retinanet_keras.results.evaluation import METRICS, coco_metrics, to_results


def truth(boxes, *, images=(1,), categories=((1, "cell"),), **extra):
    """Annotations with rows (image id, category id, x, y, w, h)."""
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in images],
        "categories": [{"id": i, "name": name} for i, name in categories],
        "annotations": [
            {"id": n, "image_id": row[0], "category_id": row[1], "bbox": list(row[2:]), **extra}
            for n, row in enumerate(boxes)
        ],
    }


def found(*rows):
    """Results of rows (image id, category id, x, y, w, h, score)."""
    return [{"image_id": r[0], "category_id": r[1], "bbox": list(r[2:6]), "score": r[6]} for r in rows]


def test_perfect_detections_have_ap_1_at_every_size():
    boxes = [(1, 1, 10, 10, 20, 20), (1, 1, 50, 50, 50, 50), (2, 1, 0, 0, 200, 200)]
    annotations = truth(boxes, images=(1, 2, 3))
    metrics = coco_metrics(annotations, found(*[(*b, 0.9) for b in boxes]))
    assert list(metrics)[:12] == list(METRICS)
    # image 1 has two objects, so one detection per image finds 2 of 3
    expected = dict.fromkeys(METRICS, 1.0) | {"AR1": 2 / 3}
    assert {k: metrics[k] for k in METRICS} == pytest.approx(expected)
    assert metrics["per_class"]["cell"] == pytest.approx({**expected, "ground_truth": 3, "detections": 3})


def test_false_positive_between_two_hits():
    annotations = truth([(1, 1, 0, 0, 100, 100), (1, 1, 200, 200, 100, 100)])
    results = found((1, 1, 0, 0, 100, 100, 0.9), (1, 1, 400, 0, 100, 100, 0.8), (1, 1, 200, 200, 100, 100, 0.7))
    metrics = coco_metrics(annotations, results)
    # precision 1 up to recall 0.5 (51 of 101 points), then 2/3
    assert metrics["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert metrics["APl"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert metrics["AR1"] == pytest.approx(0.5) and metrics["AR10"] == pytest.approx(1.0)
    assert metrics["APs"] is None and metrics["ARm"] is None


def test_overlap_of_072_counts_at_five_of_ten_thresholds():
    metrics = coco_metrics(truth([(1, 1, 0, 0, 100, 100)]), found((1, 1, 0, 0, 100, 72, 0.5)))
    assert [metrics[k] for k in ("AP", "AP50", "AP75", "AR100")] == pytest.approx([0.5, 1.0, 0.0, 0.5])


def random_case(seed):
    rng = np.random.default_rng(seed)
    images, categories = [7, 3, 139, 20], ((2, "a"), (90, "b"), (11, "c"), (5, "never"))

    def box():
        return [*rng.uniform(0, 300, 2).tolist(), *np.exp(rng.uniform(1.5, 5.5, 2)).tolist()]

    rows = [(int(rng.choice(images[:3])), int(rng.choice([2, 90, 11])), *box()) for _ in range(30)]
    annotations = truth(rows, images=images, categories=categories)
    for number, annotation in enumerate(annotations["annotations"], 1):
        box_area = annotation["bbox"][2] * annotation["bbox"][3]
        annotation.update(id=number, area=box_area * rng.uniform(0.5, 1), iscrowd=int(rng.random() < 0.1))
    results = []
    for annotation in annotations["annotations"] * 3:
        noise = rng.normal(0, 0.08, 4) * np.tile(annotation["bbox"][2:], 2)
        moved = (np.array(annotation["bbox"]) + noise).tolist()
        score = float(rng.choice([0.3, 0.5, rng.random()]))  # with ties
        results += found((annotation["image_id"], annotation["category_id"], *moved, score))
    results += found(*[(int(rng.choice(images)), int(rng.choice([2, 90, 5])), *box(), rng.random()) for _ in range(20)])
    return annotations, results


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("image_ids", [None, [139, 7]])
def test_equals_pycocotools(seed, image_ids):
    annotations, results = random_case(seed)
    before = copy.deepcopy((annotations, results))
    metrics = coco_metrics(annotations, results, image_ids=image_ids)
    assert (annotations, results) == before  # pycocotools writes into what it gets

    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = annotations
        ground.createIndex()
        reference = COCOeval(ground, ground.loadRes(results), "bbox")
        if image_ids:
            reference.params.imgIds = image_ids
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    stats = [None if v == -1 else v for v in reference.stats]
    assert [metrics[k] for k in METRICS] == stats
    precision = reference.eval["precision"][:, :, :, 0, -1]
    for k, name in enumerate(["a", "never", "c", "b"]):  # in the order of ids
        expected = precision[:, :, k].mean()
        assert metrics["per_class"][name]["AP"] == (None if expected == -1 else pytest.approx(expected))
    assert list(metrics["per_class"]) == ["a", "never", "c", "b"]
    never = metrics["per_class"]["never"]
    assert never.pop("detections") > 0 and never == {**dict.fromkeys(METRICS), "ground_truth": 0}


def test_prints_nothing(capsys):
    coco_metrics(truth([(1, 1, 0, 0, 10, 10)]), [])
    assert capsys.readouterr() == ("", "")


def test_no_detections_is_ap_0():
    metrics = coco_metrics(truth([(1, 1, 0, 0, 10, 10)], images=(1, 2)), [])
    assert metrics["AP"] == 0.0 and metrics["AR100"] == 0.0 and metrics["APl"] is None
    row = metrics["per_class"]["cell"]
    assert (row["AP"], row["AR100"], row["APl"], row["ground_truth"], row["detections"]) == (0.0, 0.0, None, 1, 0)


@pytest.mark.parametrize("image_ids", [None, []])
@pytest.mark.parametrize("annotations", [truth([]), {**truth([]), "annotations": None}])
def test_no_ground_truth_is_none(annotations, image_ids):
    metrics = coco_metrics(annotations, found((1, 1, 0, 0, 10, 10, 0.5)), image_ids=image_ids)
    assert all(metrics[k] is None for k in METRICS)
    json.dumps(metrics, allow_nan=False)


def test_fields_that_tools_leave_out_are_filled_in():
    annotations = truth([(1, 1, 0, 0, 100, 100), (1, 1, 200, 0, 10, 10)])
    for annotation in annotations["annotations"]:
        del annotation["id"]
    metrics = coco_metrics(annotations, found((1, 1, 0, 0, 100, 100, 0.9)))
    assert metrics["APl"] == pytest.approx(1.0) and metrics["APs"] == 0.0  # the areas are those of the boxes


def test_annotation_id_0_and_equal_ids_count():
    annotations = truth([(1, 1, 0, 0, 100, 100), (1, 1, 200, 0, 100, 100)])
    results = found((1, 1, 0, 0, 100, 100, 0.9), (1, 1, 200, 0, 100, 100, 0.8))
    for ids in ((0, 1), (0, 0), (5, 5)):
        for annotation, number in zip(annotations["annotations"], ids, strict=True):
            annotation["id"] = number
        assert coco_metrics(annotations, results)["AP"] == pytest.approx(1.0)


def test_crowds_are_neither_missed_nor_counted():
    annotations = truth([(1, 1, 0, 0, 100, 100), (1, 1, 200, 0, 100, 100)], area=None)
    annotations["annotations"][1]["iscrowd"] = 1
    metrics = coco_metrics(annotations, found((1, 1, 0, 0, 100, 100, 0.5), (1, 1, 210, 0, 50, 50, 0.9)))
    assert metrics["AP"] == pytest.approx(1.0)
    assert metrics["per_class"]["cell"]["ground_truth"] == 1


def test_ground_truth_that_is_not_finite_is_left_out():
    annotations = truth([(1, 1, 0, 0, 100, 100), (1, 1, float("nan"), 0, 100, 100)])
    assert coco_metrics(annotations, found((1, 1, 0, 0, 100, 100, 0.5)))["AR100"] == pytest.approx(1.0)


def test_classes_of_one_name_stay_apart():
    annotations = truth([(1, 4, 0, 0, 9, 9)], categories=((4, "bolt"), (9, "bolt"), (2, "nut")))
    per_class = coco_metrics(annotations, found((1, 4, 0, 0, 9, 9, 0.5)))["per_class"]
    assert list(per_class) == ["nut", "bolt (id 4)", "bolt (id 9)"]
    assert [row["ground_truth"] for row in per_class.values()] == [0, 1, 0]


def test_images_may_have_text_as_id():
    metrics = coco_metrics(truth([("b", 1, 0, 0, 9, 9)], images=("b", "a")), found(("b", 1, 0, 0, 9, 9, 0.5)))
    assert metrics["AP"] == pytest.approx(1.0)


def test_reads_files(tmp_path):
    annotations, results = random_case(0)
    (tmp_path / "truth.json").write_text(json.dumps(annotations))
    evaluation.write_results(tmp_path / "eval" / "results.json", results)
    from_files = coco_metrics(tmp_path / "truth.json", str(tmp_path / "eval" / "results.json"))
    assert from_files == coco_metrics(annotations, results)


GOOD = found((1, 1, 0, 0, 9, 9, 0.5))[0]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (found((8, 1, 0, 0, 9, 9, 0.5)) * 2 + [GOOD], r"2 of 3 entries have an unknown image id: 8 \(1 in all\)"),
        (found((1, 6, 0, 0, 9, 9, 0.5)), "unknown category id: 6"),
        (found(("1", 1, 0, 0, 9, 9, 0.5)), "unknown image id: '1'.*such as 1"),
        ([{**GOOD, "image_id": [1]}], "expected each image id as a number or string"),
        ({"annotations": []}, "expected a list of detections.*got dict"),
        ([GOOD, 3], "entry 1: expected an object, got int"),
        ([{k: v for k, v in GOOD.items() if k != "score"}], "entry 0 lacks score"),
        ([{**GOOD, "score": float("nan")}], "expected score as a finite number, got nan"),
        ([{**GOOD, "score": None}], "expected score as a finite number, got None"),
        ([{**GOOD, "bbox": [0, 0, 9]}], "expected bbox as a list of four numbers"),
        ([{**GOOD, "bbox": [0, 0, "9", 9]}], "expected bbox as a list of four numbers"),
        ([{**GOOD, "bbox": [0, 0, float("inf"), 9]}], "finite and without a negative size"),
        ([{**GOOD, "bbox": [50, 50, -20, 9]}], "finite and without a negative size"),
    ],
)
def test_bad_results(results, message):
    with pytest.raises(DataError, match=message):
        coco_metrics(truth([(1, 1, 0, 0, 9, 9)]), results)


def test_bad_files(tmp_path):
    path = tmp_path / "broken.json"
    with pytest.raises(DataError, match="broken.json cannot be read"):
        coco_metrics(truth([]), path)
    path.write_text('[{"image_id": 1,')
    with pytest.raises(DataError, match="broken.json is not JSON"):
        coco_metrics(truth([]), path)
    with pytest.raises(DataError, match="broken.json"):
        coco_metrics(path, [])


def test_bad_annotations():
    good = truth([(1, 1, 0, 0, 9, 9)])
    with pytest.raises(DataError, match="expected a list under 'images', got nothing"):
        coco_metrics({"categories": []}, [])
    with pytest.raises(DataError, match="images: expected each id once.*such as 1"):
        coco_metrics({**good, "images": good["images"] * 2}, [])
    with pytest.raises(DataError, match="categories: expected objects with a number or string"):
        coco_metrics({**good, "categories": [{"name": "cell"}]}, [])
    with pytest.raises(DataError, match="annotations: 1 of 1 entries have an unknown category id: 1"):
        coco_metrics({**good, "categories": []}, [])
    with pytest.raises(DataError, match="image_ids: 1 of 2 entries have an unknown image id: 5"):
        coco_metrics(good, [], image_ids=np.array([1, 5]))


def test_to_results_gives_xywh_and_plain_short_numbers():
    categories = Categories((3, 90), ("a", "b"))
    boxes = np.array([[10.5, 20, 30, 60], [0.1, 0.2, 0.4, 0.9], [0, 0, 0, 0]], np.float32)
    scores = np.array([0.9, 1 / 3, 0], np.float32)
    results = to_results(np.int64(12), boxes, scores, np.array([1, 0, -1]), categories)  # the last row is padding
    assert len(results) == 2
    assert results[0] == {"image_id": 12, "category_id": 90, "bbox": [10.5, 20.0, 19.5, 40.0], "score": 0.9}
    assert results[1]["category_id"] == 3 and np.float32(results[1]["score"]) == scores[1]
    assert json.dumps(results[1]["score"]) == "0.33333334"
    assert {type(v) for r in results for v in (*r["bbox"], r["score"])} == {float}
    assert {type(v) for r in results for v in (r["image_id"], r["category_id"])} == {int}


def test_to_results_without_detections():
    assert to_results(1, np.zeros((0, 4)), [], [], Categories((1,), ("a",))) == []


def test_to_results_refuses_what_cannot_be_written():
    one = Categories((1,), ("a",))
    with pytest.raises(DataError, match="has label 1, but the 1 categories"):
        to_results(1, [[0, 0, 1, 1]], [0.5], [1], one)
    with pytest.raises(DataError, match="not finite"):
        to_results(1, [[0, 0, 1, np.inf]], [0.5], [0], one)
    with pytest.raises(DataError, match="got 1, 2 and 1"):
        to_results(1, [[0, 0, 1, 1]], [0.5, 0.4], [0], one)


def test_results_round_trip_to_ap_1():
    boxes = np.array([[10, 10, 60, 80], [100, 5, 130, 200]], np.float32)
    annotations = truth([(1, 7, 10, 10, 50, 70), (1, 3, 100, 5, 30, 195)], categories=((7, "x"), (3, "y")))
    results = to_results(1, boxes, [0.9, 0.8], [1, 0], Categories((3, 7), ("y", "x")))
    assert coco_metrics(annotations, results)["AP"] == pytest.approx(1.0)


def test_format_metrics_names_every_number():
    metrics = coco_metrics(truth([(1, 1, 0, 0, 100, 100)]), found((1, 1, 0, 0, 100, 72, 0.5)))
    lines = evaluation.format_metrics(metrics).splitlines()
    assert [line.split()[0] for line in lines[:12]] == list(METRICS)
    assert lines[0].split()[1] == "50.0" and lines[3].split()[1] == "-"
    assert lines[-1].split() == ["cell", "50.0", "100.0", "50.0", "1"]
    assert len(evaluation.format_metrics({**metrics, "per_class": {}}).splitlines()) == 12


def test_failed_write_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    evaluation.write_metrics(path, {"AP": 0.5, "APs": None})
    assert json.loads(path.read_text()) == {"AP": 0.5, "APs": None}
    with pytest.raises(ValueError, match="JSON"):
        evaluation.write_metrics(path, {"AP": float("nan")})

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        evaluation.write_metrics(path, {"AP": 0.7})
    assert json.loads(path.read_text())["AP"] == 0.5
    assert os.listdir(tmp_path) == ["metrics.json"]
