"""Detection sets of TensorFlow Datasets other than COCO: VOC by its own builder, from a local mirror."""

import io
import json
import tarfile

import miniature_coco as miniature
import numpy as np
import pytest

from retinanet_keras.config import config_from_dict
from retinanet_keras.data import coco, dataset_formats, image_decoding

# class, difficult, (xmin, ymin, xmax, ymax)
OBJECTS = {
    "000001": [("dog", 0, (11, 21, 61, 71)), ("person", 1, (1, 1, 40, 90))],
    "000002": [("person", 0, (5, 7, 77, 43))],
    "000003": [("tvmonitor", 1, (30, 30, 90, 80))],
}


def voc_archive(path):
    """VOCtrainval or VOCtest, as the server has them: lists, XML, JPEG files."""
    with tarfile.open(path, "w") as archive:

        def add(name, content):
            info = tarfile.TarInfo(f"VOCdevkit/VOC2007/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        add("readme.txt", path.name.encode())  # TFDS takes files of one checksum for one file
        for split in ("train", "val", "test"):
            add(f"ImageSets/Main/{split}.txt", "\n".join(OBJECTS).encode())
        for name, objects in OBJECTS.items():
            encoded, height, width = miniature.image(int(name))
            add(f"JPEGImages/{name}.jpg", encoded)
            xml = "".join(
                f"<object><name>{kind}</name><pose>left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
                f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                for kind, difficult, (x1, y1, x2, y2) in objects
            )
            size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
            add(f"Annotations/{name}.xml", f"<annotation>{size}{xml}</annotation>".encode())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc")
    (root / "mirror").mkdir()
    for name in ("VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"):
        voc_archive(root / "mirror" / name)
    config = config_from_dict({"data": {"dir": str(root / "data"), "name": "voc/2007"}}).data
    with miniature.downloads_from(root / "mirror"):
        dataset_formats.open_split(config, "train")
    return config


def test_voc_trains_on_its_boxes_and_difficult_ones_count_as_crowds(config):
    dataset = dataset_formats.open_split(config, "validation")
    assert len(dataset.categories) == 20 and dataset.categories.names[11] == "dog" and dataset.categories.ids[11] == 12
    tree = json.loads(open(dataset.annotation_file).read())
    names = {image["id"]: image["file_name"] for image in tree["images"]}
    assert sorted(names) == [1, 2, 3] and sorted(names.values()) == [f"{name}.jpg" for name in OBJECTS]
    for i, image_id in enumerate(dataset.image_ids):
        name = names[image_id].removesuffix(".jpg")
        easy = [(kind, box) for kind, difficult, box in OBJECTS[name] if not difficult]
        assert dataset.boxes_of(i).tolist() == [list(map(float, box)) for _, box in easy]
        assert [dataset.categories.names[label] for label in dataset.labels_of(i)] == [kind for kind, _ in easy]
        assert tuple(dataset.sizes[i]) == miniature.image(int(name))[1:]
    crowds = {(a["category_id"], tuple(a["bbox"])) for a in tree["annotations"] if a["iscrowd"]}
    assert crowds == {(15, (1, 1, 39, 89)), (20, (30, 30, 60, 50))}


def test_several_splits_make_one_and_images_without_boxes_are_skipped_where_asked(config):
    both = dataset_formats.open_split(config, "train+validation")
    assert len(both) == 6 and len(set(both.image_ids)) == 6
    assert len(dataset_formats.open_split(config, "train", keep_empty=False)) == 2
    assert image_decoding.unusable_images(both, np.arange(6)) == []


def test_the_index_is_made_once_and_again_where_the_files_have_changed(config, monkeypatch):
    from retinanet_keras.data import tfds

    made, original = [], tfds._read_examples
    monkeypatch.setattr(tfds, "_read_examples", lambda *args: made.append(args) or original(*args))
    first = dataset_formats.open_split(config, "test")
    dataset_formats.open_split(config, "test")
    assert len(made) == 1
    with open(first.files[0], "ab") as file:
        file.write(b"\0")
    again = dataset_formats.open_split(config, "test")
    assert len(made) == 2 and again.spans.tolist() == first.spans.tolist()


def test_where_the_sets_folder_cannot_be_written_the_index_goes_to_the_cache(config, tmp_path, monkeypatch):
    from retinanet_keras.data import tfds

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tfds.os, "access", lambda path, mode: str(tmp_path) in str(path))
    dataset = dataset_formats.open_split(config, "validation[:2]")
    assert dataset.annotation_file.startswith(str(tmp_path / "retinanet_keras/voc/2007")) and len(dataset) == 2
    assert isinstance(dataset, coco.CocoDataset)
