"""COCO's JSON in, labels and xyxy boxes out; and every fault of the JSON named."""

import copy
import json
import logging
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retinanet_keras.data import coco
from retinanet_keras.data.coco import Categories
from retinanet_keras.errors import DataError

pytestmark = pytest.mark.check


def tree():
    """Three images, the second without boxes; category ids with gaps and out of order."""
    return {
        "images": [
            {"id": 30, "file_name": "c.jpg", "width": 100, "height": 50},
            {"id": 10, "file_name": "sub/a.jpg", "width": 40, "height": 60},
            {"id": 20, "file_name": "b.jpg", "width": 80, "height": 80},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 44, "name": "ant"}],
        "annotations": [
            {"id": 1, "image_id": 20, "category_id": 90, "bbox": [1, 2, 3, 4], "iscrowd": 0},
            {"id": 2, "image_id": 30, "category_id": 3, "bbox": [90.5, 10.25, 20, 30]},
            {"id": 3, "image_id": 20, "category_id": 44, "bbox": [0, 0, 80, 80], "iscrowd": 0},
            {"id": 4, "image_id": 20, "category_id": 44, "bbox": [5, 5, 60, 60], "iscrowd": 1},
        ],
    }


@pytest.fixture
def load(tmp_path):
    def load(content, **options):
        (tmp_path / "images").mkdir(exist_ok=True)
        file = tmp_path / "instances.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return coco.load(file, tmp_path / "images", **options)

    return load


def changed(**changes):
    """The tree with entries changed: image=(0, {...}), annotation=..., category=...; None removes a key."""
    result = tree()
    for name, (index, values) in changes.items():
        entry = result[{"image": "images", "annotation": "annotations", "category": "categories"}[name]][index]
        for key, value in values.items():
            if value is None:
                del entry[key]
            else:
                entry[key] = value
    return result


def test_load(load, tmp_path):
    dataset = load(tree())
    assert dataset.categories == Categories((3, 44, 90), ("cat", "ant", "dog"))
    assert dataset.image_ids.tolist() == [30, 10, 20] and dataset.image_ids.dtype == np.int64
    assert dataset.files[1] == str(tmp_path / "images" / "sub" / "a.jpg")
    assert dataset.sizes.tolist() == [[50, 100], [60, 40], [80, 80]] and dataset.sizes.dtype == np.int32
    assert dataset.offsets.tolist() == [0, 1, 1, 3] and dataset.offsets.dtype == np.int64
    assert dataset.boxes_of(0).tolist() == [[90.5, 10.25, 100, 40.25]]  # clipped right
    assert dataset.boxes_of(1).shape == (0, 4) and dataset.labels_of(1).shape == (0,)
    assert dataset.boxes_of(2).tolist() == [[1, 2, 4, 6], [0, 0, 80, 80]]
    assert dataset.labels_of(2).tolist() == [2, 1]
    assert dataset.boxes.dtype == np.float32 and dataset.labels.dtype == np.int32
    assert dataset.dropped == {"crowd": 1}
    assert len(dataset) == 3 and dataset.max_boxes == 2


def test_keep_empty(load):
    assert load(tree(), keep_empty=False).image_ids.tolist() == [30, 20]
    only_crowd = tree()
    only_crowd["annotations"] = only_crowd["annotations"][3:]
    assert len(load(only_crowd)) == 3 and load(only_crowd).max_boxes == 1
    with pytest.raises(DataError, match="none of its 3 images has a usable box.*data.keep_empty"):
        load(only_crowd, keep_empty=False)


def test_empty_because_of_ignored_boxes(load):
    content = tree()
    content["annotations"] = [
        {"id": 1, "image_id": 10, "category_id": 3, "bbox": [0, 0, 0, 5]},
        {"id": 2, "image_id": 20, "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        {"id": 3, "image_id": 30, "category_id": 3, "bbox": [0, 0, 5, 5]},
    ]
    assert load(content, keep_empty=False).image_ids.tolist() == [30]


@pytest.mark.parametrize("annotations", [None, []])
def test_without_annotations(load, annotations):
    content = tree()
    del content["annotations"]
    if annotations is not None:
        content["annotations"] = annotations
    dataset = load(content)
    assert len(dataset) == 3 and dataset.boxes.shape == (0, 4) and dataset.offsets.tolist() == [0, 0, 0, 0]


def test_unusable_boxes_are_ignored_with_one_warning(load, caplog):
    boxes = [
        [float("nan"), 0, 5, 5],
        [0, 0, float("inf"), 5],
        [3, 3, 0, 5],
        [9, 9, 4, -2],
        [80, 0, 5, 5],
        [-9, 0, 5, 5],
    ]
    content = tree()
    content["annotations"] += [
        {"id": 100 + i, "image_id": 20, "category_id": 3, "bbox": box} for i, box in enumerate(boxes)
    ]
    with caplog.at_level(logging.WARNING, "retinanet_keras"):
        dataset = load(content)
    assert dataset.dropped == {"crowd": 1, "not finite": 2, "without area": 2, "outside the image": 2}
    assert len(dataset.boxes) == 3
    (record,) = caplog.records
    for part in ("2 boxes not finite", "annotation 100", "2 boxes without area", "annotation 102",
                 "2 boxes outside the image", "annotation 104", "python -m retinanet_keras inspect"):  # fmt: skip
        assert part in record.getMessage()


def test_boxes_beyond_all_numbers_are_ignored(load):
    content = tree()
    content["annotations"] += [
        {"id": 100, "image_id": 20, "category_id": 3, "bbox": [1e308, 0, 1e308, 5]},
        {"id": 101, "image_id": 20, "category_id": 3, "bbox": [0, 0, 1e16, 5]},
    ]
    assert load(content).dropped == {"crowd": 1, "not finite": 2}


def test_a_byte_order_mark_is_accepted(load):
    assert len(load("\ufeff" + json.dumps(tree()))) == 3


def test_messages_hold_names_as_short_text(load):
    content = changed(image=(0, {"width": 0, "file_name": "\x1b[2J" + "x" * 100_000}))
    with pytest.raises(DataError) as caught:
        load(content)
    assert r"\x1b[2Jxxx" in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


VALUES = st.sampled_from([
    None, True, False, 0, -1, 20, 10**400, 2**63, 1.5, float("nan"), float("inf"), 1e308, "", "20", "\ud800",
    [], {}, [1], [0, 0, 5, 5], [0, 0, True, 5], [0, 0, 1e308, 1e308], "x" * 1000,
])  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["images", "annotations", "categories"]), st.integers(0, 3),
                          st.sampled_from(["id", "image_id", "category_id", "bbox", "width", "height", "file_name",
                                           "name", "iscrowd", "area", None]), VALUES), min_size=1, max_size=4),
       st.floats(0, 1))  # fmt: skip
def test_damaged_annotations_are_loaded_rightly_or_told(load, changes, cut):
    """What is loaded holds arrays that training can take, and the same is scored."""
    content = tree()
    for kind, index, key, value in changes:
        rows = content[kind]
        if key is None:
            rows[index % len(rows)] = value
        elif isinstance(rows[index % len(rows)], dict):
            rows[index % len(rows)][key] = value
    text = json.dumps(content)
    try:
        dataset = load(text if cut < 0.9 else text[: int(len(text) * (cut - 0.9) * 10)])
    except DataError as error:
        assert len(str(error)) < 5000
        return
    assert np.isfinite(dataset.boxes).all() and (dataset.boxes[:, 2:] > dataset.boxes[:, :2]).all()
    assert (dataset.sizes > 0).all() and dataset.offsets[-1] == len(dataset.boxes) == len(dataset.labels)
    assert ((dataset.labels >= 0) & (dataset.labels < len(dataset.categories))).all()
    limits = np.repeat(dataset.sizes[:, ::-1], np.diff(dataset.offsets), axis=0)
    assert (dataset.boxes[:, 2:] <= limits).all() and (dataset.boxes >= 0).all()


def test_a_clean_file_warns_of_nothing(load, caplog):
    load(tree())
    assert not caplog.records


def test_a_box_that_vanishes_in_float32_is_ignored(load):
    content = changed(annotation=(0, {"bbox": [70.0, 2, 1e-9, 4]}))
    assert load(content).dropped["outside the image"] == 1


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"images": [,]}', "is not valid JSON: line 1, column 13"),
        ("[1, 2]", "must hold a JSON object"),
        ({"annotations": []}, r"`images`(.|\n)*`categories`"),
        ({**tree(), "categories": []}, "`categories`.*Expected a list"),
        ({**tree(), "images": []}, "`images`"),
        (changed(image=(1, {"id": None})), r"1 images without a whole number as `id`: images\[1\] has null"),
        (changed(image=(1, {"id": "10"})), r'images\[1\] has "10"'),
        (changed(image=(1, {"file_name": None})), r"1 images without a `file_name`: images\[1\]"),
        (changed(image=(1, {"width": None})), r"`width` and `height`: sub/a.jpg has \[null, 60\]"),
        (changed(image=(1, {"height": 0})), r"sub/a.jpg has \[40, 0\]"),
        (changed(image=(1, {"height": -6})), r"sub/a.jpg has \[40, -6\]"),
        (changed(image=(1, {"height": float("nan")})), r"sub/a.jpg has \[40, NaN\]"),
        (changed(image=(1, {"id": 30})), r"1 images with a duplicate id: 30 \(sub/a.jpg\)"),
        (changed(category=(1, {"id": 90})), r"1 categories with a duplicate id: 90 \(cat\)"),
        (changed(category=(1, {"name": None})), r"categories\[1\] is"),
        (changed(annotation=(1, {"image_id": 31})), r"not in `images`: annotation 2 \(image_id 31\)"),
        (changed(annotation=(1, {"image_id": None})), r"not in `images`: annotation 2 \(image_id null\)"),
        (changed(annotation=(1, {"category_id": 4})), r"annotation 2 \(category_id 4\).*\[3, 44, 90\]"),
        (changed(annotation=(1, {"bbox": [1, 2, 3]})), r"annotation 2 \(bbox \[1, 2, 3\]\).*\[x, y, width, height\]"),
        (changed(annotation=(1, {"bbox": [1, 2, 3, "4"]})), "annotation 2"),
        (changed(annotation=(1, {"bbox": None})), r"annotation 2 \(bbox null\)"),
        (changed(annotation=(1, {"bbox": [1, True, 3, 4]})), r"annotation 2 \(bbox \[1, true, 3, 4\]\)"),
        (changed(annotation=(1, {"bbox": [1.5, 2, 3, False]})), r"annotation 2 \(bbox \[1.5, 2, 3, false\]\)"),
        (changed(annotation=(1, {"image_id": True})), r"annotation 2 \(image_id true\)"),
        (changed(annotation=(1, {"category_id": True})), r"annotation 2 \(category_id true\)"),
        (changed(image=(1, {"id": True})), r"without a whole number as `id`: images\[1\] has true"),
        (changed(image=(1, {"width": True})), r"sub/a.jpg has \[true, 60\]"),
        (changed(category=(1, {"id": True})), r"categories\[1\] is \{\"id\": true"),
        (changed(category=(1, {"name": "half \ud800"})), r"categories\[1\] is .*half \\ud800.*lone surrogates"),
        (changed(image=(1, {"width": 10**400})), r"sub/a.jpg has \[1000"),
        ("[" * 200_000, "is not valid JSON: lists or objects are nested too deeply"),
        ('{"images": ' + "1" * 5000 + "}", "is not valid JSON: a number has thousands of digits"),
    ],
)
def test_structural_faults(load, content, words):
    with pytest.raises(DataError, match=words) as error:
        load(content)
    assert "instances.json" in str(error.value)


def test_all_faults_are_told_at_once_with_counts_and_few_examples(load):
    content = changed(image=(0, {"width": 0}))
    content["annotations"] += [
        {"id": 50 + i, "image_id": 99, "category_id": 3, "bbox": [0, 0, 1, 1]} for i in range(20)
    ]
    with pytest.raises(DataError) as error:
        load(content)
    text = str(error.value)
    assert "20 annotations of an image" in text and "annotation 52" in text and "annotation 53" not in text
    assert "1 images without whole" in text and "c.jpg" in text
    assert "annotation 2 " not in text  # its image is listed, if badly


def test_examine_keeps_what_is_usable(tmp_path):
    content = changed(image=(0, {"width": 0}), annotation=(0, {"category_id": 5}))
    findings, dataset = coco.examine(content, "x.json", tmp_path)
    assert {finding.rule for finding in findings} == {"image-size", "annotation-category"}
    assert dataset.image_ids.tolist() == [10, 20] and dataset.boxes.tolist() == [[0, 0, 80, 80]]


def test_whole_numbers_written_as_floats_are_taken(load):
    content = changed(image=(2, {"id": 20.0, "width": 80.0}), annotation=(0, {"image_id": 20.0, "category_id": 90.0}))
    assert load(content).boxes_of(2).shape == (2, 4)


def test_missing_annotation_file_names_its_neighbors(tmp_path):
    (tmp_path / "instances_train2017.json").write_text("{}")
    with pytest.raises(DataError, match="instances_train2017.json"):
        coco.load(tmp_path / "instances_train.json", tmp_path)
    with pytest.raises(DataError, match="no .json file"):
        coco.load(tmp_path / "nowhere" / "a.json", tmp_path)


def test_missing_image_folder(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(tree()))
    with pytest.raises(DataError, match="image folder that does not exist: .*pictures"):
        coco.load(tmp_path / "a.json", tmp_path / "pictures")


def test_files_that_are_missing_or_not_regular(load, tmp_path):
    dataset = load(tree())
    (tmp_path / "images" / "sub").mkdir()
    (tmp_path / "images" / "sub" / "a.jpg").touch()
    os.mkfifo(tmp_path / "images" / "b.jpg")
    images = tmp_path / "images"
    assert coco.unusable_files(dataset) == ([str(images / "c.jpg")], [str(images / "b.jpg")])
    (images / "c.jpg").symlink_to(images / "sub" / "a.jpg")
    (images / "b.jpg").unlink()
    (images / "b.jpg").mkdir()
    assert coco.unusable_files(dataset) == ([], [str(images / "b.jpg")])


def test_subset(load):
    dataset = load(tree())
    part = dataset.subset([2, 1, 2])
    assert part.image_ids.tolist() == [20, 10, 20] and part.offsets.tolist() == [0, 2, 2, 4]
    np.testing.assert_array_equal(part.boxes_of(2), dataset.boxes_of(2))
    np.testing.assert_array_equal(part.labels, [2, 1, 2, 1])
    assert part.files[1] == dataset.files[1] and part.sizes[1].tolist() == [60, 40]
    assert len(dataset.subset([])) == 0 and dataset.subset([]).boxes.shape == (0, 4)
    assert dataset.subset(dataset.sizes[:, 0] > 55).image_ids.tolist() == [10, 20]


def test_categories_round_trip():
    categories = Categories((1, 7), ("person", "ant"))
    rows = categories.to_list()
    assert rows == [{"label": 0, "id": 1, "name": "person"}, {"label": 1, "id": 7, "name": "ant"}]
    assert Categories.from_list(json.loads(json.dumps(rows[::-1]))) == categories and len(categories) == 2
    with pytest.raises(DataError, match="labels 0 to 1"):
        Categories.from_list([rows[0], copy.copy(rows[0])])
    for damaged in ({}, 5, None, [5], [{}], [{**rows[0], "id": True}], [{**rows[0], "name": 3}], [{"label": 0}]):
        with pytest.raises(DataError, match="Expected categories as a list of objects with whole numbers"):
            Categories.from_list(damaged)
