"""Scoring a split of COCO's size without a network: time and memory from detections in memory to metrics.json.

    python benchmarks/evaluation.py                        # both libraries
    python benchmarks/evaluation.py --library hotcoco

5,000 images with 36,000 objects of 80 classes, 1% of them crowds, and 100 detections an image: a third are moved and
rescaled objects of their image, where it has some, and the rest are anywhere. The time is that of `Records.append`
for every image, `write_results`, `coco_metrics` of the file just written (read again, as `evaluate.py --results` does)
and `write_metrics`; the memory is the process's peak, libraries included. Each library has a process of its own. The
exit status is 1 where a bound is missed (pycocotools 110 s and 3 GB, hotcoco 30 s and 3 GB), where a number differs
between the libraries, or where it differs from pycocotools called on the file by its own documentation, which is
measured for comparison (`--library plain`). About two minutes on two cores.
Linux only: memory is read from /proc.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

IMAGES, DETECTIONS, CLASSES, OBJECTS, SEED = 5_000, 100, 80, 36_000, 0
BOUNDS = {"pycocotools": (110, 3_000), "hotcoco": (30, 3_000)}  # seconds, MB


def objects(rng):
    """(image [M], class [M], boxes [M, 4] x, y, width, height) of COCO's range of sizes."""
    corners = rng.uniform(0, (560, 400), (OBJECTS, 2))
    boxes = np.concatenate([corners, np.exp(rng.uniform(2, 5.5, (OBJECTS, 2)))], axis=1).round(2)
    return np.sort(rng.integers(0, IMAGES, OBJECTS)), rng.integers(0, CLASSES, OBJECTS), boxes


def annotations(image, category, boxes, rng):
    crowd = rng.random(OBJECTS) < 0.01
    rows = zip(image.tolist(), category.tolist(), boxes.tolist(), crowd.tolist(), strict=True)
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(IMAGES)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(CLASSES)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": k, "bbox": box, "area": box[2] * box[3], "iscrowd": int(c)}
            for n, (i, k, box, c) in enumerate(rows, 1)
        ],
    }


def detections(image, category, boxes, rng):
    """(boxes [100, 4] x1, y1, x2, y2, scores [100], labels [100]) of each image."""
    starts = np.searchsorted(image, np.arange(IMAGES + 1))
    for i in range(IMAGES):
        anywhere = np.concatenate(
            [rng.uniform(0, (560, 400), (DETECTIONS, 2)), np.exp(rng.uniform(2, 5.5, (DETECTIONS, 2)))], axis=1
        )
        labels, scores = rng.integers(0, CLASSES, DETECTIONS), rng.random(DETECTIONS) * 0.7
        if starts[i] < starts[i + 1]:
            near = rng.integers(starts[i], starts[i + 1], DETECTIONS // 3)
            moved = boxes[near] + rng.normal(0, 0.1, (len(near), 4)) * np.tile(boxes[near, 2:], 2)
            anywhere[: len(near)] = np.maximum(moved, (-np.inf, -np.inf, 1, 1))
            labels[: len(near)], scores[: len(near)] = category[near], rng.random(len(near))
        anywhere[:, 2:] += anywhere[:, :2]
        yield anywhere.astype("float32"), scores.astype("float32"), labels


def plain(folder):
    """(seconds, the 12 numbers) of pycocotools on the files, as its documentation calls it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "truth.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(folder / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return time.perf_counter() - began, evaluation.stats.tolist()


def ours(folder, library):
    """(seconds, the 12 numbers) from detections in memory to the files."""
    from retinanet_keras.data.coco import Categories
    from retinanet_keras.evaluation import coco_metrics
    from retinanet_keras.evaluation.results import ImageDetections, Records

    rng = np.random.default_rng(SEED)
    drawn = objects(rng)
    found = list(detections(*drawn, rng))
    categories = Categories(tuple(range(CLASSES)), tuple(f"class {k}" for k in range(CLASSES)))
    began = time.perf_counter()
    records = Records()
    for i, one in enumerate(found):
        records.append(ImageDetections(i, *one), categories)
    coco_metrics.write_results(folder / "results.json", records)
    written = time.perf_counter()
    metrics = coco_metrics.coco_metrics(folder / "truth.json", folder / "results.json", library=library)
    coco_metrics.write_metrics(folder / "metrics.json", metrics)
    ended = time.perf_counter()
    print(
        f"{library}: {written - began:.1f} s to results.json, {ended - written:.1f} s to metrics.json", file=sys.stderr
    )
    return ended - began, [metrics[name] for name in coco_metrics.METRICS]


def peak_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def child(library, folder):
    """One measurement, as a line of JSON."""
    seconds, numbers = plain(folder) if library == "plain" else ours(folder, library)
    print(json.dumps({"seconds": seconds, "mb": peak_mb(), "numbers": numbers}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", action="append", choices=(*BOUNDS, "plain"), help="measure these alone")
    parser.add_argument("--child", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.library[0], arguments.child)
    rng = np.random.default_rng(SEED)
    rows, missed = {}, False
    with tempfile.TemporaryDirectory() as folder:
        tree = annotations(*objects(rng), np.random.default_rng(SEED + 1))
        Path(folder, "truth.json").write_text(json.dumps(tree))
        print(f"{'':12} {'seconds':>8} {'bound':>6} {'peak MB':>8} {'bound':>6} {'AP':>9}")
        # The results file that `plain` reads is written by the others.
        for library in sorted(arguments.library or (*BOUNDS, "plain"), key=lambda name: name == "plain"):
            command = [sys.executable, __file__, "--library", library, "--child", folder]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows[library] = row = json.loads(out.splitlines()[-1])
            seconds, mb = BOUNDS.get(library, (float("inf"), float("inf")))
            missed |= row["seconds"] > seconds or row["mb"] > mb
            print(
                f"{library:12} {row['seconds']:8.1f} {seconds:6.0f} {row['mb']:8.0f} {mb:6.0f} "
                f"{row['numbers'][0]:9.6f}",
                flush=True,
            )
    equal = len({tuple(row["numbers"]) for row in rows.values()}) == 1
    print(f"the bounds {'are MISSED' if missed else 'hold'}; the 12 numbers are {'equal' if equal else 'NOT equal'}")
    sys.exit(missed or not equal)


if __name__ == "__main__":
    main()
