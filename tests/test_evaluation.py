"""Evaluation: hand-worked numbers, pycocotools called directly, and every way its input can be wrong."""

import contextlib
import copy
import dataclasses
import io
import json
import os

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinanet_keras.config import EvalConfig
from retinanet_keras.data.coco import Categories
from retinanet_keras.errors import DataError
from retinanet_keras.evaluation import ground_truth as truths
from retinanet_keras.evaluation import matching
from retinanet_keras.evaluation.coco_metrics import (
    LIBRARIES,
    METRICS,
    coco_metrics,
    format_metrics,
    to_results,
    write_metrics,
    write_results,
)
from retinanet_keras.evaluation.results import Records


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


@pytest.mark.parametrize("library", LIBRARIES)
def test_prints_nothing(capfd, recwarn, library):
    coco_metrics(truth([(1, 1, 0, 0, 10, 10)]), [], library=library)
    coco_metrics(*random_case(0), library=library)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


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


def test_fields_that_tools_omit_are_filled_in():
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


def test_ground_truth_that_is_not_finite_is_ignored():
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
    write_results(tmp_path / "eval" / "results.json", results)
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
        ([{**GOOD, "image_id": True}], "expected each image id as a number or string"),
        ([{**GOOD, "category_id": True}], "expected each category id as a number or string"),
        ([{**GOOD, "score": 1e308}], r"expected score as a finite number of at most 1e\+15, got 1e\+308"),
        ([{**GOOD, "bbox": [0, 0, 1e308, 9]}], r"at most 1e\+15, got \[0, 0, 1e\+308, 9\]"),
        ([{**GOOD, "bbox": [0] * 100_000}], r"expected bbox as a list of four numbers, got \[0, 0, 0.{0,50}\.\.\.$"),
        ({"annotations": []}, "expected a list of detections.*got dict"),
        ([GOOD, 3], "entry 1: expected an object, got int"),
        ([{k: v for k, v in GOOD.items() if k != "score"}], "entry 0 lacks score"),
        ([{**GOOD, "score": float("nan")}], "expected score as a finite number of at most 1e.15, got nan"),
        ([{**GOOD, "score": None}], "expected score as a finite number of at most 1e.15, got None"),
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
    with pytest.raises(DataError, match="broken.json is not valid JSON"):
        coco_metrics(truth([]), path)
    path.write_text("[" * 200_000)
    with pytest.raises(DataError, match="broken.json is not valid JSON: .*nested too deeply"):
        coco_metrics(truth([]), path)
    path.write_text("\ufeff[]", encoding="utf-8")
    assert coco_metrics(truth([(1, 1, 0, 0, 9, 9)]), path)["AP"] == 0
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
    lines = format_metrics(metrics).splitlines()
    assert [line.split()[0] for line in lines[:12]] == list(METRICS)
    assert lines[0].split()[1] == "50.0" and lines[3].split()[1] == "-"
    assert lines[-1].split() == ["cell", "50.0", "100.0", "50.0", "1"]
    assert len(format_metrics({**metrics, "per_class": {}}).splitlines()) == 12


def test_failed_write_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_metrics(path, {"AP": 0.5, "APs": None})
    assert json.loads(path.read_text()) == {"AP": 0.5, "APs": None}
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(path, {"AP": float("nan")})

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_metrics(path, {"AP": 0.7})
    assert json.loads(path.read_text())["AP"] == 0.5
    assert os.listdir(tmp_path) == ["metrics.json"]


# What the numbers must be, worked out by hand. The 101 recalls are 0, 0.01, ..., 1.

TWO = [(1, 1, 0, 0, 100, 100), (1, 1, 200, 200, 100, 100)]


def twelve(metrics):
    return [metrics[name] for name in METRICS]


def test_boxes_shifted_by_a_fifth_count_at_four_of_ten_thresholds():
    metrics = coco_metrics(truth(TWO), found((1, 1, 20, 0, 100, 100, 0.9), (1, 1, 220, 200, 100, 100, 0.8)))
    # 80 of 100 + 100 - 80 is 2/3: more than 0.50, 0.55, 0.60 and 0.65, less than 0.70
    assert [metrics[k] for k in ("AP", "AP50", "AP75", "AR100")] == pytest.approx([0.4, 1, 0, 0.4])
    metrics = coco_metrics(truth(TWO), found((1, 1, 100, 0, 100, 100, 0.9)))  # side by side
    assert metrics["AP"] == 0


@pytest.mark.parametrize(
    ("order", "expected"),
    [("AABB", (51 + 50 * 2 / 3) / 101), ("ABAB", 1.0), ("ABBA", 1.0), ("AAAB", (51 + 50 * 2 / 4) / 101)],
)
def test_a_second_detection_of_an_object_is_false(order, expected):
    rows = {"A": TWO[0], "B": TWO[1]}
    results = found(*[(*rows[name], 0.9 - 0.1 * n) for n, name in enumerate(order)])
    # AABB: right, wrong, right: recall 0.5 at precision 1 (51 points), recall 1 at 2/3
    metrics = coco_metrics(truth(TWO), results)
    assert metrics["AP"] == pytest.approx(expected) and metrics["AR100"] == 1
    assert sum(metrics["scores"]["matched"]) == sum(metrics["scores"]["unmatched"]) == 2


def test_the_order_of_results_is_of_no_matter():
    annotations, results = random_case(1)
    for n, result in enumerate(results):
        result["score"] = (n * 37 % 101 + n / 1000) / 200  # all different
    shuffled = [results[i] for i in np.random.default_rng(0).permutation(len(results))]
    assert coco_metrics(annotations, shuffled) == coco_metrics(annotations, results)


def test_labels_shuffled_among_the_classes_are_wrong():
    rows = [(1, 1, 0, 0, 100, 100), (1, 2, 200, 200, 100, 100)]
    annotations = truth(rows, categories=((1, "a"), (2, "b")))
    swapped = found(*[(1, 3 - k, *box, 0.9) for _, k, *box in rows])
    metrics = coco_metrics(annotations, swapped)
    assert twelve(metrics) == [0, 0, 0, None, None, 0, 0, 0, 0, None, None, 0]
    assert sum(metrics["scores"]["unmatched"]) == 2 and metrics["images"]["best"] == []


def test_images_without_detections_cost_only_their_own_objects():
    results = found((1, 1, 0, 0, 100, 100, 0.9))
    alone = coco_metrics(truth(TWO[:1]), results)
    assert twelve(coco_metrics(truth(TWO[:1], images=range(1, 9)), results)) == twelve(alone)
    missed = coco_metrics(truth([*TWO[:1], (2, 1, 0, 0, 100, 100)], images=(1, 2)), results)
    assert missed["AP"] == pytest.approx(51 / 101) and missed["AR100"] == 0.5


def test_classes_without_ground_truth_change_none_of_the_12_numbers():
    annotations, results = random_case(2)
    before = twelve(coco_metrics(annotations, results))
    annotations["categories"].insert(0, {"id": 1, "name": "nothing"})
    results += found(*[(7, 1, 0, 0, 100, 100, 1.0)] * 50)
    metrics = coco_metrics(annotations, results)
    assert twelve(metrics) == before
    assert metrics["per_class"]["nothing"] == {**dict.fromkeys(METRICS), "ground_truth": 0, "detections": 50}
    assert metrics["curves"]["per_class"]["nothing"] is None


def test_curves_and_histogram_of_a_miss_between_two_hits():
    results = found((*TWO[0], 0.91), (1, 1, 400, 0, 100, 100, 0.8), (1, 1, 200, 200, 100, 72, 0.32))
    metrics = coco_metrics(truth(TWO), results)
    curves = metrics["curves"]["all"]
    assert metrics["curves"]["recall"] == [n / 100 for n in range(101)]
    assert curves["0.50"] == [1.0] * 51 + [0.66667] * 50
    assert curves["0.75"] == [1.0] * 51 + [0.0] * 50  # an overlap of 0.72
    assert curves["0.50:0.95"] == [1.0] * 51 + [0.33333] * 50  # at five of ten
    assert metrics["curves"]["per_class"] == {"cell": curves}
    scores = metrics["scores"]
    assert scores["edges"] == pytest.approx(np.arange(21) / 20)
    assert [n for n, count in enumerate(scores["matched"]) if count] == [6, 18] and sum(scores["matched"]) == 2
    assert [n for n, count in enumerate(scores["unmatched"]) if count] == [16] and sum(scores["unmatched"]) == 1
    wider = coco_metrics(truth(TWO), found((*TWO[0], 3.0), (*TWO[1], -1.0)))["scores"]
    assert (wider["edges"][0], wider["edges"][-1], sum(wider["matched"])) == (-1, 3, 2)


def test_best_and_worst_images():
    rows = [(i, 1, x, 0, 90, 90) for i in (1, 2, 3, 4) for x in (0, 100)]
    annotations = truth([*rows, (6, 1, 0, 0, 90, 90)], images=range(1, 8))
    annotations["annotations"][-1]["iscrowd"] = 1
    results = found(
        (*rows[0], 0.9), (*rows[1], 0.8),  # image 1: both
        (*rows[2], 0.9), (2, 1, 300, 0, 90, 90, 0.7),  # image 2: one, and one where nothing is
        (3, 1, 300, 0, 90, 90, 0.9),  # image 3: none
        (*rows[6], 0.9), (*rows[7], 0.6), (4, 1, 300, 0, 90, 90, 0.1),  # image 4: both; then the score is too low
        (5, 1, 300, 0, 90, 90, 0.2),  # image 5 has no objects, and no detection of that score
        (6, 1, 20, 20, 40, 40, 0.9),  # image 6 has a crowd
    )  # fmt: skip
    images = coco_metrics(annotations, results)["images"]
    # from 0.6 on: 5 found of 8, 2 false: F1 = 10 / 15; from 0.8 on: 4 found, 1 false: 8 / 13; with 0.2: 10 / 16
    assert (images["min_score"], images["f1"]) == (0.6, pytest.approx(10 / 15))
    assert [(row["image_id"], row["f1"]) for row in images["best"]] == [(1, 1.0), (4, 1.0)]
    assert images["worst"] == [
        {"image_id": 3, "f1": 0.0, "found": 0, "missed": 2, "false": 1},
        {"image_id": 2, "f1": 0.5, "found": 1, "missed": 1, "false": 1},
    ]
    only = coco_metrics(annotations, results, image_ids=[3, 7])["images"]
    assert [row["image_id"] for row in only["worst"]] == [3] and only["best"] == [] and only["min_score"] == 0.5


def many(seed, images=150, per_image=90):
    """Random annotations and results with what libraries may treat differently: 12,000 detections and more.

    Equal scores, boxes and overlaps; crowds; objects of exactly 32 x 32 and 96 x 96 pixels, areas that are not their
    box's; boxes without width; more than 100 detections of a class in an image; classes and images with objects, with
    detections, with both and with neither; ids that are text.
    """
    rng = np.random.default_rng(seed)
    ids, kinds = [f"image {n}" for n in range(images)], [f"kind {k}" for k in range(7)]
    sides = np.array([0, 1, 16, 32, 32.001, 64, 96, 96.001, 200])

    def boxes(n):
        return np.concatenate([rng.integers(0, 300, (n, 2)), rng.choice(sides, (n, 2))], axis=1)

    rows, results = [], []
    for i in range(images):
        objects = boxes(rng.integers(1, 12) if i % 5 else 0)
        kind = rng.integers(0, 6, len(objects))  # kind 6 has no objects
        rows += [(ids[i], kinds[k], *box) for k, box in zip(kind, objects.tolist(), strict=True)]
        n = 0 if i % 7 == 3 else 300 if i % 50 == 1 else per_image
        guessed, guess = boxes(n), rng.integers(0, 2 if n == 300 else 7, n)
        if len(objects):
            near = rng.random(n) < 0.6
            of = rng.integers(0, len(objects), n)
            moved = objects[of] + rng.normal(0, 0.07, (n, 4)) * np.tile(objects[of, 2:], 2) * (rng.random((n, 1)) < 0.8)
            moved[:, 2:] = np.abs(moved[:, 2:])
            guessed[near], guess[near] = moved[near], kind[of][near]
        guess[guess == 5] = 4  # kind 5 is never detected
        scores = np.where(rng.random(n) < 0.5, rng.choice([0, 0.3, 0.5, 1], n), rng.random(n))
        results += found(
            *[(ids[i], kinds[k], *b, s) for b, k, s in zip(guessed.tolist(), guess, scores.tolist(), strict=True)]
        )
    annotations = truth(rows, images=ids, categories=[(k, k.upper()) for k in kinds])
    for number, annotation in enumerate(annotations["annotations"], 1):
        area = annotation["bbox"][2] * annotation["bbox"][3]
        annotation.update(id=number, area=float(rng.choice([area, 0.7 * area, 1024, 9216, 0])))
        annotation["iscrowd"] = int(rng.random() < 0.15)
    return annotations, [results[i] for i in rng.permutation(len(results))]


def by_hand(annotations, results):
    """pycocotools' COCOeval of results in files or lists, called as its documentation says; ids become numbers."""
    annotations, results = copy.deepcopy((annotations, results))
    images = {i["id"]: n for n, i in enumerate(sorted(annotations["images"], key=lambda i: i["id"]), 1)}
    kinds = {c["id"]: n for n, c in enumerate(sorted(annotations["categories"], key=lambda c: c["id"]), 1)}
    for entry in [*annotations["annotations"], *results]:
        entry.update(image_id=images[entry["image_id"]], category_id=kinds[entry["category_id"]])
    for entries, numbers in ((annotations["images"], images), (annotations["categories"], kinds)):
        for entry in entries:
            entry["id"] = numbers[entry["id"]]
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = annotations
        ground.createIndex()
        reference = COCOeval(ground, ground.loadRes(results), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    return reference


@pytest.fixture(scope="module", params=range(2))
def crowd_of_cases(request):
    """(annotations, results, pycocotools by hand) of `many`."""
    annotations, results = many(request.param)
    assert len(results) > 10_000
    return annotations, results, by_hand(annotations, results)


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_gives_pycocotools_bits(crowd_of_cases, library, tmp_path):
    annotations, results, reference = crowd_of_cases
    write_results(tmp_path / "results.json", results)
    metrics = coco_metrics(annotations, tmp_path / "results.json", library=library)
    assert twelve(metrics) == [None if v == -1 else v for v in reference.stats]
    precision, recall = reference.eval["precision"], reference.eval["recall"]
    for k, row in enumerate(metrics["per_class"].values()):
        of_class = [precision[:, :, k, 0, 2], precision[0, :, k, 0, 2], precision[5, :, k, 0, 2]]
        of_class += [precision[:, :, k, area, 2] for area in (1, 2, 3)]
        of_class += [recall[:, k, 0, limit] for limit in range(3)] + [recall[:, k, area, 2] for area in (1, 2, 3)]
        expected = [None if (v == -1).all() else v[v > -1].mean() for v in of_class]
        assert [row[name] for name in METRICS] == expected
        assert row["detections"] == sum(r["category_id"] == f"kind {k}" for r in results)
    assert metrics["per_class"]["KIND 6"]["AP"] is None and metrics["per_class"]["KIND 5"]["AP"] == 0
    told = precision[:, :, (precision[0, 0, :, 0, 2] > -1), 0, 2]
    assert metrics["curves"]["all"]["0.75"] == pytest.approx(told[5].mean(axis=1), abs=1e-5)


def test_the_libraries_agree_in_everything(crowd_of_cases):
    annotations, results, _ = crowd_of_cases
    chosen = [image["id"] for image in annotations["images"][3::2]]
    for image_ids in (None, chosen, chosen[:1], []):
        first, *others = (coco_metrics(annotations, results, image_ids=image_ids, library=name) for name in LIBRARIES)
        assert others == [first]
    none = coco_metrics(annotations, [], library="hotcoco")
    assert none == coco_metrics(annotations, []) and none["AP"] == 0


def test_the_choices_of_the_setting_are_the_libraries():
    (setting,) = (f for f in dataclasses.fields(EvalConfig) if f.name == "library")
    assert setting.metadata["choices"] == tuple(LIBRARIES) and setting.default == "pycocotools"


def test_matches_are_pycocotools(crowd_of_cases):
    annotations, results, reference = crowd_of_cases
    known = truths.read(annotations)
    columns = truths.number(Records.from_json(results), known)
    verdicts = matching.match(known, columns, np.arange(len(known.images)))
    expected = np.full(len(results), matching.IGNORED)  # past the 100 of a class in an image
    for found_here in filter(None, reference.evalImgs):
        if found_here["aRng"] == [0, 1e10]:
            rows = np.array(found_here["dtIds"], int) - 1
            expected[rows] = np.where(found_here["dtIgnore"][0], matching.IGNORED, found_here["dtMatches"][0] > 0)
    assert (verdicts == expected).all()
    assert all((verdicts == kind).sum() > 100 for kind in (matching.MATCHED, matching.UNMATCHED, matching.IGNORED))


def test_of_objects_equally_near_the_last_is_taken():
    a, b = (1, 1, 0, 0, 100, 100), (1, 1, 40, 0, 100, 100)
    results = found((1, 1, 20, 0, 100, 100, 0.9), (*b, 0.8))  # 2/3 of both; then all of b and 0.43 of a
    for order, matched, ap50 in (((a, b), 1, 51 / 101), ((b, a), 2, 1.0)):
        metrics = coco_metrics(truth(order), results)  # pycocotools does so: AP50 tells
        assert sum(metrics["scores"]["matched"]) == matched and metrics["AP50"] == pytest.approx(ap50)


def test_metrics_are_written_a_curve_to_a_line_and_read_again(tmp_path):
    annotations, results = random_case(3)
    annotations["categories"][0]["name"] = 'half \ud800 [\n"1", 2]'
    metrics = coco_metrics(annotations, results)
    write_metrics(tmp_path / "metrics.json", metrics)
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    assert json.loads(text) == metrics and len(text.splitlines()) < 250
