"""Target assignment (§4, Anchors) against the textbook's matrix of all IoUs: time and memory.

    python benchmarks/assignment.py

Two images of 800 x 1344 pixels (201,600 anchors each) with 100 boxes each, and the more usual 20 boxes padded to 100.
Both formulations run under XLA and as a plain graph. They are timed in turn in one process, so that whatever else the
machine does falls on both, and medians are compared; memory is measured in a fresh process each. The exit
status is 1 where a ratio misses its bound. Takes two minutes on two CPU cores. Linux only: memory is read from /proc.
"""

import retinanet_keras  # noqa: F401  (sets up the process, before TensorFlow is imported)

# isort: split

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from keras import ops

from retinanet_keras import boxes
from retinanet_keras.anchors import anchor_boxes
from retinanet_keras.targets import BACKGROUND, IGNORE, assign

HEIGHT, WIDTH = 800, 1344  # a photograph of 3:5 at the paper's largest scale, Table 1e, padded to a multiple of 32
IMAGES, ROWS, CLASSES = 2, 100, 80
BOXES = (100, 20)  # real boxes per image
# How many times leaner and faster than the matrix `assign` has to be with 100 boxes per image.
LEANER = {"XLA": 3.0, "graph": 3.0}
FASTER = {"XLA": 3.0, "graph": 1.0}


def matrix(anchors, gt_boxes, gt_labels):
    """What `assign` returns with low_quality="detectron", from all IoUs at once, [B, N, A], as a textbook has it."""
    usable = (gt_labels >= 0) & (boxes.area(gt_boxes) > 0)  # [B, N]
    overlap = ops.where(usable[..., None], boxes.iou(gt_boxes, anchors[None]), 0.0)  # [B, N, A]
    highest = ops.max(overlap, axis=2, keepdims=True)  # [B, N, 1]
    forced = ops.any((overlap == highest) & (highest > 0), axis=1)  # [B, A]
    return targets_of(anchors, gt_boxes, gt_labels, ops.max(overlap, axis=1), ops.argmax(overlap, axis=1), forced)


def tuned_matrix(anchors, gt_boxes, gt_labels):
    """The same with as few passes over the matrix as TensorFlow allows."""
    usable = (gt_labels >= 0) & (boxes.area(gt_boxes) > 0)  # [B, N]
    real_boxes = ops.where(usable[..., None], gt_boxes, 0.0)  # cheaper than clearing rows of the matrix
    overlap = boxes.iou(real_boxes, anchors[None])  # [B, N, A]
    best_box = tf.argmax(overlap, axis=1, output_type="int32")  # Keras's passes several times more, to tell -0 from 0
    highest = ops.max(overlap, axis=2, keepdims=True)  # [B, N, 1]
    forced = ops.any(overlap == ops.where(highest > 0, highest, 2.0), axis=1)  # [B, A]; no IoU is 2
    return targets_of(anchors, gt_boxes, gt_labels, ops.max(overlap, axis=1), best_box, forced)


def targets_of(anchors, gt_boxes, gt_labels, best_iou, best_box, forced, positive_iou=0.5, negative_iou=0.4):
    """Class targets and deltas from each anchor's highest IoU, its box, and whether it is a box's best, [B, A] each."""
    positive = (best_iou >= positive_iou) | (forced & (best_iou >= negative_iou))
    label = ops.take_along_axis(gt_labels, best_box, axis=1)
    class_targets = ops.where(positive, label, ops.where(best_iou < negative_iou, BACKGROUND, IGNORE))
    matched = ops.take_along_axis(gt_boxes, best_box[..., None], axis=1)  # [B, A, 4]
    matched = ops.where(positive[..., None], matched, anchors)
    return ops.cast(class_targets, "int32"), boxes.encode(anchors, matched)


FORMULATIONS = {"assign": assign, "matrix": matrix, "tuned matrix": tuned_matrix}


def compiled(name, mode):
    """A formulation as a tf.function of (anchors, gt_boxes, gt_labels)."""
    formulation = FORMULATIONS[name]
    # Sizes stay open, so that a graph traced on small images is the one that runs on large ones.
    signature = [tf.TensorSpec((None, 4)), tf.TensorSpec((None, None, 4)), tf.TensorSpec((None, None), "int32")]
    return tf.function(lambda *tensors: formulation(*tensors), signature, jit_compile=mode == "XLA")


def make_inputs(count, height=HEIGHT, width=WIDTH):
    """Anchors [A, 4], boxes of 16 to 600 pixels [B, N, 4], and labels [B, N], `count` of them no padding.

    Anchors are rounded to quarters of a pixel and boxes to whole ones: areas are then exact in float32, in whatever
    order and fusion they are computed, so results can be compared bit by bit.
    """
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(16), np.log(600), (IMAGES, ROWS, 2)))
    corner = rng.uniform(0, 1, sides.shape) * (np.array([WIDTH, HEIGHT]) - sides)
    gt_boxes = np.round(np.concatenate([corner, corner + sides], axis=-1))
    gt_labels = rng.integers(0, CLASSES, (IMAGES, ROWS))
    gt_boxes[:, count:], gt_labels[:, count:] = 0, -1
    anchors = np.round(4 * ops.convert_to_numpy(anchor_boxes(height, width))) / 4
    return tf.constant(anchors, "float32"), tf.constant(gt_boxes, "float32"), tf.constant(gt_labels, "int32")


def check_equal(functions, tensors):
    """Raises unless the formulations give the same numbers, bit by bit."""
    results = {name: [part.numpy() for part in function(*tensors)] for name, function in functions.items()}
    for name, parts in results.items():
        for what, found, expected in zip(("classes", "deltas"), parts, results["assign"], strict=True):
            if not np.array_equal(found, expected):
                raise RuntimeError(f"{name}: expected the {what} of assign, {np.sum(found != expected)} values differ")


def median_ms(functions, tensors, rounds):
    """Milliseconds per call of each function, called in turn."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for part in function(*tensors):
                part.numpy()  # waits for the result
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def resident_mb(field):
    """VmRSS, the memory now, or VmHWM, its peak since the last reset, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"expected {field} in /proc/self/status, which Linux has; found none")


def peak_mb(name, mode, count, calls=5):
    """MB by which this process grows at its peak when images of full size follow small ones.

    The small ones leave the libraries, the graph and XLA's compiler in memory. TensorFlow keeps what a call
    freed, so the call that counts is the first of full size.
    """
    function = compiled(name, mode)
    small, full = make_inputs(count, 64, 64), make_inputs(count)
    for _ in range(3):
        function(*small)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident_mb("VmRSS")
    for _ in range(calls):
        function(*full)
    return resident_mb("VmHWM") - before


def peak_mb_of_own_process(name, mode, count):
    command = [sys.executable, __file__, "--memory-of", name, mode, str(count)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"measuring the memory of {name} ({mode}) failed:\n{child.stderr}")
    return float(child.stdout.split()[-1])


def measure(count, mode, rounds):
    """{name: ms} and {name: MB} of every formulation."""
    print(f"{count} boxes, {mode}: compiling, comparing results ...", end=" ", flush=True)
    functions = {name: compiled(name, mode) for name in FORMULATIONS}
    tensors = make_inputs(count)
    check_equal(functions, tensors)
    print("equal; timing ...", end=" ", flush=True)
    times = median_ms(functions, tensors, rounds)
    print("memory ...", end=" ", flush=True)
    peaks = {name: peak_mb_of_own_process(name, mode, count) for name in FORMULATIONS}
    print("done", flush=True)
    return times, peaks


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each formulation (9)")
    parser.add_argument("--memory-of", nargs=3, metavar=("NAME", "MODE", "BOXES"), help="only that number, in MB")
    arguments = parser.parse_args()
    if arguments.memory_of:
        name, mode, count = arguments.memory_of
        print(peak_mb(name, mode, int(count)))
        return

    measured = {(count, mode): measure(count, mode, arguments.rounds) for count in BOXES for mode in FASTER}
    print(f"\n{'boxes':>5}  {'mode':5}  {'formulation':12}  {'ms':>6}  {'extra MB':>8}  {'faster':>6}  {'leaner':>6}")
    for (count, mode), (times, peaks) in measured.items():
        for name in FORMULATIONS:
            faster, leaner = times[name] / times["assign"], peaks[name] / peaks["assign"]
            print(
                f"{count:5}  {mode:5}  {name:12}  {times[name]:6.1f}  {peaks[name]:8.1f}  {faster:6.2f}  {leaner:6.2f}"
            )
    print('("faster" and "leaner": how many times the time and the memory of assign)\n')

    missed = 0
    for what, bounds, part in (("leaner", LEANER, 1), ("faster", FASTER, 0)):
        for mode, bound in bounds.items():
            found = measured[BOXES[0], mode][part]
            ratio = found["matrix"] / found["assign"]
            missed += ratio < bound
            verdict = "holds" if ratio >= bound else "MISSED"
            print(f"{mode:5}  assign is {ratio:5.2f} times {what} than the matrix; required {bound:.1f}: {verdict}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
