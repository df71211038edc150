"""The paper's splits, from COCO's files of 2017 and 2014 and through TFDS's own builder: the same images and boxes."""

import json

import miniature_coco as miniature
import numpy as np
import pytest

from retinanet_keras.config import config_from_dict
from retinanet_keras.data import dataset_formats, image_decoding, training_batches
from retinanet_keras.dataset_check import inspection
from retinanet_keras.errors import DataError
from retinanet_keras.evaluation import coco_metrics


def data_config(folder, source="coco", **settings):
    return config_from_dict({"data": {"source": source, "dir": str(folder), **settings}}).data


def by_id(dataset):
    return dataset.subset(np.argsort(dataset.image_ids))


def check_same(ours, theirs):
    """The same images, pixels and boxes; in whatever order, from whatever files."""
    ours, theirs = by_id(ours), by_id(theirs)
    assert ours.categories == theirs.categories and len(ours.categories) == 80
    for name in ("image_ids", "sizes", "offsets", "boxes", "labels"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    for i in range(len(ours)):
        np.testing.assert_array_equal(image_decoding.image_of(ours, i), image_decoding.image_of(theirs, i))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """COCO's files of 2017."""
    root = tmp_path_factory.mktemp("coco2017")
    miniature.layout_2017(root)
    return root


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Where TFDS's own `coco/2017` builder has prepared the archives of a local mirror, by our first use of it."""
    root = tmp_path_factory.mktemp("tfds")
    miniature.archives(root / "mirror")
    with miniature.downloads_from(root / "mirror"):
        dataset_formats.open_split(data_config(root / "data", "tfds"), "minival")
    return root / "data"


@pytest.mark.parametrize(
    "split, ids",
    [("trainval35k", miniature.TRAIN), ("train2017", miniature.TRAIN), ("minival", miniature.VAL),
     ("val2017", miniature.VAL), ("test-dev", miniature.TEST_DEV)],
)  # fmt: skip
def test_the_papers_splits_are_found_in_the_files_of_2017(files, split, ids):
    dataset = dataset_formats.open_split(data_config(files), split)
    assert tuple(dataset.image_ids) == ids and dataset.labeled == (split != "test-dev")
    assert image_decoding.unusable_images(dataset, np.arange(len(ids))) == []


@pytest.mark.parametrize("split", ["trainval35k", "minival"])
def test_the_files_of_2014_hold_the_same_splits(files, tmp_path, split):
    miniature.layout_2014(tmp_path)
    config = data_config(tmp_path)
    with pytest.raises(DataError, match="instances_val2017.json.*The ids of minival"):
        dataset_formats.open_split(config, split)
    val2017 = (files / "annotations/instances_val2017.json").read_bytes()
    (tmp_path / "annotations/instances_val2017.json").write_bytes(val2017)
    check_same(dataset_formats.open_split(config, split), dataset_formats.open_split(data_config(files), split))
    whole = json.loads((tmp_path / "annotations/instances_val2014.json").read_text())
    (tmp_path / "annotations/instances_val2014.json").write_text(json.dumps({**whole, "images": whole["images"][1:]}))
    if split == "minival":
        with pytest.raises(DataError, match="lacks 1 of the 6 images"):
            dataset_formats.open_split(config, split)


@pytest.mark.parametrize("damage, words", [
    ({"images": None}, "'images', each with id and file_name"), ({"images": [{"id": 1}]}, "'images', each with id"),
    ({"annotations": [3]}, "'annotations', each with image_id"), ({"categories": {}}, "'categories'. Download"),
])  # fmt: skip
def test_damaged_files_of_2014_are_told(files, tmp_path, damage, words):
    miniature.layout_2014(tmp_path)
    val2017 = (files / "annotations/instances_val2017.json").read_bytes()
    (tmp_path / "annotations/instances_val2017.json").write_bytes(val2017)
    damaged = tmp_path / "annotations/instances_val2014.json"
    damaged.write_text(json.dumps({**json.loads(damaged.read_text()), **damage}))
    with pytest.raises(DataError, match=f"instances_val2014.json: expected a list of objects under {words}"):
        dataset_formats.open_split(data_config(tmp_path), "minival")


def test_a_split_that_is_nowhere_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"minival: expected .*instances_minival.json, or COCO's .*val2017.json"):
        dataset_formats.open_split(data_config(tmp_path), "minival")
    with pytest.raises(DataError, match="image_info_test-dev2017.json with the images in .*test2017"):
        dataset_formats.open_split(data_config(tmp_path), "test-dev")


@pytest.mark.parametrize("split", ["trainval35k", "minival", "train", "validation"])
def test_tfds_gives_the_images_and_boxes_of_the_files(files, tfds_dir, split):
    official = {"train": "train2017", "validation": "val2017"}.get(split, split)
    ours = dataset_formats.open_split(data_config(tfds_dir, "tfds"), split)
    check_same(ours, dataset_formats.open_split(data_config(files), official))


def test_tfds_takes_parts_of_splits_and_names_the_splits_there_are(tfds_dir):
    config = data_config(tfds_dir, "tfds")
    first, rest = (dataset_formats.open_split(config, split) for split in ("train[:4]", "train[4:]"))
    assert len(first) == 4 and sorted([*first.image_ids, *rest.image_ids]) == list(miniature.TRAIN)
    with pytest.raises(DataError, match="coco/2017 has no split dev .*validation"):
        dataset_formats.open_split(config, "dev")


def test_the_official_annotations_are_used_where_they_are_given(files, tfds_dir, tmp_path):
    """With them TFDS's cut areas are out of the way, and test-dev can be told from the whole test."""
    (tmp_path / "coco").symlink_to(tfds_dir / "coco")
    config = data_config(tmp_path, "tfds")
    with pytest.raises(DataError, match="test-dev of coco/2017.*expected at .*image_info_test-dev2017.json"):
        dataset_formats.open_split(config, "test-dev")
    (tmp_path / "annotations").symlink_to(files / "annotations")
    dataset = dataset_formats.open_split(config, "minival")
    assert dataset.annotation_file == str(tmp_path / "annotations/instances_val2017.json")
    check_same(dataset, dataset_formats.open_split(data_config(files), "minival"))
    test = dataset_formats.open_split(config, "test-dev")
    assert tuple(test.image_ids) == miniature.TEST_DEV and not test.labeled


def test_minival_gives_the_same_numbers_through_tfds_and_through_the_json(files, tfds_dir):
    """Of detections near the objects, some missed, some false."""
    truth = by_id(dataset_formats.open_split(data_config(files), "minival"))
    through_tfds = dataset_formats.open_split(data_config(tfds_dir, "tfds"), "minival")
    rng, results = np.random.default_rng(0), []
    for i, image_id in enumerate(truth.image_ids.tolist()):
        boxes = truth.boxes_of(i) + rng.uniform(-4, 4, truth.boxes_of(i).shape)
        kept = rng.random(len(boxes)) < 0.8
        results += coco_metrics.to_results(
            image_id, boxes[kept], rng.random(kept.sum()), truth.labels_of(i)[kept], truth.categories
        )
    ours, theirs = (
        coco_metrics.coco_metrics(dataset.annotation_file, results, image_ids=dataset.image_ids.tolist())
        for dataset in (through_tfds, truth)
    )
    assert 0.2 < theirs["AP"] < 0.9
    assert {name: ours[name] for name in coco_metrics.METRICS} == {name: theirs[name] for name in coco_metrics.METRICS}
    assert ours["per_class"] == theirs["per_class"]


def test_a_training_sees_the_same_steps_through_tfds_and_goes_on_in_their_midst(files, tfds_dir, tmp_path):
    """With the same annotation file, which gives the order; each worker reads its share."""
    (tmp_path / "coco").symlink_to(tfds_dir / "coco")
    (tmp_path / "annotations").symlink_to(files / "annotations")
    settings = {"short_side": 96, "max_side": 160, "scale_jitter": [0.8, 1.2]}
    datasets = {
        config: dataset_formats.open_split(config, "trainval35k")
        for config in (data_config(tmp_path, "tfds", **settings), data_config(files, **settings))
    }
    ours, theirs = (
        list(training_batches.training_batches(dataset, config, batch_size=2, seed=3).take(8).as_numpy_iterator())
        for config, dataset in datasets.items()
    )
    for (images, truth), (images_, truth_) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(images, images_)
        for name, value in truth.items():
            np.testing.assert_array_equal(value, truth_[name], err_msg=name)
    config, dataset = next(iter(datasets.items()))
    later = training_batches.training_batches(dataset, config, batch_size=2, seed=3, start=5, share=(1, 2))
    images, truth = next(iter(later.as_numpy_iterator()))
    np.testing.assert_array_equal(images, ours[5][0][1:])


def test_what_cannot_be_downloaded_or_is_no_detection_set_is_said(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(miniature._Downloader, "_sync_download", refuse)
    with pytest.raises(DataError, match="could not be downloaded and prepared there: ConnectionError: no ro"):
        dataset_formats.open_split(data_config(tmp_path, "tfds"), "minival")
    with pytest.raises(DataError, match="coca/2017 is not a dataset that .* Similar names: .*coco"):
        dataset_formats.open_split(data_config(tmp_path, "tfds", name="coca/2017"), "train")
    with pytest.raises(
        DataError, match="expected a detection dataset with `image` and `objects`.*mnist has image, label"
    ):
        dataset_formats.open_split(data_config(tmp_path, "tfds", name="mnist"), "train")


def test_a_damaged_image_in_a_tfrecord_is_named(tfds_dir, tmp_path):
    dataset = dataset_formats.open_split(data_config(tfds_dir, "tfds"), "minival")
    start, length = dataset.spans[2]
    with open(dataset.files[2], "rb") as file:
        content = bytearray(file.read())
    content[start : start + length] = bytes(length)
    (tmp_path / "damaged").write_bytes(content)
    from retinanet_keras.data import coco

    broken = coco.with_spans(dataset, [str(tmp_path / "damaged")] * len(dataset), dataset.spans)
    problems = image_decoding.unusable_images(broken, np.arange(len(broken)))
    assert len(problems) == 1 and f"image {dataset.image_ids[2]} in {tmp_path}/damaged cannot be read" in problems[0]


def test_coco_2014_through_tfds_holds_the_papers_splits(files, tmp_path):
    """minival is picked by val2017's ids, trainval35k is all the rest; the tests' images come from TFDS's test2015."""
    miniature.archives_2014(tmp_path / "mirror")
    config = data_config(tmp_path / "data", "tfds", name="coco/2014")
    with miniature.downloads_from(tmp_path / "mirror"):
        with pytest.raises(DataError, match="minival of coco/2014: .* expected at .*instances_val2017.json"):
            dataset_formats.open_split(config, "minival")
    (tmp_path / "data/annotations").mkdir()
    val2017 = (files / "annotations/instances_val2017.json").read_bytes()
    (tmp_path / "data/annotations/instances_val2017.json").write_bytes(val2017)
    for split in ("trainval35k", "minival"):
        check_same(dataset_formats.open_split(config, split), dataset_formats.open_split(data_config(files), split))


def test_an_index_that_was_cut_off_is_made_again(tfds_dir):
    config = data_config(tfds_dir, "tfds")
    expected = dataset_formats.open_split(config, "validation")
    (saved,) = (tfds_dir / "coco/2017/1.1.0/retinanet_keras").glob("validation-*.npz")
    saved.write_bytes(saved.read_bytes()[:100])
    check_same(dataset_formats.open_split(config, "validation"), expected)


def test_a_split_without_objects_has_no_labels(tfds_dir):
    dataset = dataset_formats.open_split(data_config(tfds_dir, "tfds"), "test")
    assert len(dataset) == len(miniature.TEST) and not dataset.labeled


def test_folders_of_ones_own_are_where_the_configuration_says(files, tmp_path):
    """`images/train/x.jpg` as `train/x.jpg` in `images`, and a folder of the split's name beside it."""
    tree = json.loads((files / "annotations/instances_val2017.json").read_text())
    for image in tree["images"]:
        image["file_name"] = f"train/{image['file_name']}"
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(tree))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/train").symlink_to(files / "val2017")
    (tmp_path / "train").mkdir()
    dataset = dataset_formats.open_split(data_config(tmp_path), "train")
    assert image_decoding.unusable_images(dataset, np.arange(len(dataset))) == []


def test_a_set_of_tfds_is_inspected_like_files(tfds_dir, tmp_path):
    settings = {"dir": str(tfds_dir), "train_split": "trainval35k", "val_split": "minival"}
    report = inspection.inspect(config_from_dict({"data": settings, "anchors": {"size": 1.0}}), tmp_path)
    numbers = report["splits"]["minival"]
    assert numbers["images"] == len(miniature.VAL) and numbers["left_out"]["crowd"] == 1
    assert (tmp_path / "minival_boxes.png").stat().st_size > 1000
