"""COCO in miniature: real JPEG files and JSON with the real 80 categories, in the layouts of 2014, 2017 and the server.

Images have odd sizes and both orientations; there are a crowd, an image without objects, and images of one object.
"""

import contextlib
import io
import json
import zipfile
from unittest import mock

import numpy as np
from PIL import Image
from tensorflow_datasets.core.download.download_manager import DownloadManager
from tensorflow_datasets.core.download.downloader import _Downloader

NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
IDS = [*range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70, *range(72, 83), *range(84, 91)]
CATEGORIES = [{"id": i, "name": name, "supercategory": "any"} for i, name in zip(IDS, NAMES, strict=True)]
SIZES = [(97, 131), (131, 97), (120, 160), (161, 119), (100, 100), (75, 201)]  # height, width
TRAIN, VAL, TEST = (9, 25, 30, 34, 36, 42, 49), (139, 285, 632, 724, 776, 785), (1, 16, 19, 57, 63)
TEST_DEV = (16, 57, 63)


def image(image_id):
    """A JPEG's bytes, and its height and width."""
    rng = np.random.default_rng(image_id)
    height, width = SIZES[image_id % len(SIZES)]
    coarse = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.BICUBIC).save(buffer, "JPEG", quality=92)
    return buffer.getvalue(), height, width


def entries(ids, prefix="", empty=(42, 785), crowded=(30, 632)):
    """COCO's `images` and `annotations` of these image ids."""
    images, annotations = [], []
    for image_id in ids:
        rng = np.random.default_rng(image_id)
        _, height, width = image(image_id)
        images.append({"id": image_id, "file_name": f"{prefix}{image_id:012d}.jpg", "height": height, "width": width})
        for n in range(0 if image_id in empty else rng.integers(1, 6)):
            w, h = np.round(rng.uniform(12, 60, 2), 2).tolist()
            x, y = (round(float(rng.uniform(0, side - length)), 2) for side, length in ((width, w), (height, h)))
            annotations.append({
                "id": 1000 * image_id + n, "image_id": image_id, "category_id": IDS[int(rng.integers(80)) if n else 0],
                "bbox": [x, y, w, h], "area": round(0.7 * w * h, 4), "iscrowd": int(image_id in crowded and n == 0),
                "segmentation": [[x, y, x + w, y, x + w, y + h]],
            })  # fmt: skip
    return images, annotations


def tree(ids, *, labeled=True, prefix=""):
    images, annotations = entries(ids, prefix)
    return {"images": images, **({"annotations": annotations} if labeled else {}), "categories": CATEGORIES}


def write_files(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def jpegs(folder, ids, prefix=""):
    return {f"{folder}/{prefix}{i:012d}.jpg": image(i)[0] for i in ids}


def as_json(**trees):
    return {f"annotations/{name}.json": json.dumps(value).encode() for name, value in trees.items()}


def layout_2017(root):
    """The files as COCO's archives of 2017 unpack into one folder."""
    write_files(root, {**jpegs("train2017", TRAIN), **jpegs("val2017", VAL), **jpegs("test2017", TEST)})
    write_files(root, as_json(**{
        "instances_train2017": tree(TRAIN), "instances_val2017": tree(VAL),
        "image_info_test-dev2017": tree(TEST_DEV, labeled=False),
    }))  # fmt: skip


def layout_2014(root):
    """The same images in the files of 2014: val2014 is val2017 and a part of train2017."""
    moved, train = TRAIN[:3], TRAIN[3:]
    prefixes = {"train2014": "COCO_train2014_", "val2014": "COCO_val2014_"}
    for name, ids in (("train2014", train), ("val2014", (*VAL, *moved))):
        write_files(root, jpegs(name, ids, prefixes[name]))
        write_files(root, as_json(**{f"instances_{name}": tree(ids, prefix=prefixes[name])}))


def archives(root):
    """COCO's zip files of 2017, as the server has them."""
    trees = as_json(instances_train2017=tree(TRAIN), instances_val2017=tree(VAL))
    infos = as_json(**{
        "image_info_test2017": tree(TEST, labeled=False), "image_info_test-dev2017": tree(TEST_DEV, labeled=False)
    })  # fmt: skip
    write_archives(root, {
        "train2017": jpegs("train2017", TRAIN), "val2017": jpegs("val2017", VAL), "test2017": jpegs("test2017", TEST),
        "annotations_trainval2017": trees, "image_info_test2017": infos,
    })  # fmt: skip


def archives_2014(root):
    """COCO's zip files of 2014, with the images of `layout_2014`."""
    splits = {"train2014": TRAIN[3:], "val2014": (*VAL, *TRAIN[:3]), "test2014": TEST[:1], "test2015": TEST[1:]}
    prefixes = {name: f"COCO_{name}_" for name in splits}
    trees = {name: tree(ids, labeled=name[:4] != "test", prefix=prefixes[name]) for name, ids in splits.items()}
    write_archives(root, {
        **{name: jpegs(name, ids, prefixes[name]) for name, ids in splits.items()},
        "annotations_trainval2014": as_json(**{f"instances_{n}": trees[n] for n in ("train2014", "val2014")}),
        **{f"image_info_{n}": as_json(**{f"image_info_{n}": trees[n]}) for n in ("test2014", "test2015")},
    })  # fmt: skip


def write_archives(root, contents):
    """Zip files by name, of {path: content}."""
    root.mkdir(parents=True, exist_ok=True)
    for name, files in contents.items():
        with zipfile.ZipFile(root / f"{name}.zip", "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)


@contextlib.contextmanager
def downloads_from(mirror):
    """Within, TFDS's downloader takes the files of a folder for those of the network, and knows no checksums."""

    def fetch(self, url, destination_path, verify=True):
        result = self._sync_file_copy(str(mirror / url.rsplit("/", 1)[1]), destination_path)
        self._pbar_url.update(1)
        return result

    with (
        mock.patch.object(_Downloader, "_sync_download", fetch),
        mock.patch.object(DownloadManager, "_register_or_validate_checksums"),
    ):
        yield
