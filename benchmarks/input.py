"""The input pipeline of training alone: speed, CPU time, memory, and the padding its canvases waste.

    python benchmarks/input.py                                       # generated JPEGs
    python benchmarks/input.py --data CONFIG.json --set data.dir=... # the training split of a configuration

Batches of 16 images at the paper's 800 pixels. The generated photographs have the sizes that are commonest in COCO, in
proportions that are made up: the padding printed for them is not COCO's. `training_batches` is compared with a tf.data
map without parallel calls that gives the same batches bit by bit, and reduced decoding with exact on photographs of 12
megapixels. Streams are timed in turn in one process and medians are compared; memory is measured in a fresh process
each. The exit status is 1 where the pipeline is slower than the plain map, or three canvases waste more than two, or
than padding to a square. The CPUs must be free: one that others use is one that only the pipeline would have used, and
the plain map loses nothing by it. Under three minutes on two CPU cores.
Linux only: memory is read from /proc.
"""

import retinanet_keras  # noqa: F401  (sets up the process, before TensorFlow is imported)

# isort: split

import argparse
import dataclasses
import io
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

from retinanet_keras.config import config_from_dict, load_config
from retinanet_keras.data import canvas, coco, dataset_formats, examples, training_batches
from retinanet_keras.data.buckets import TrainingOrder

BATCH, SEED = 16, 0  # §4.1: 16 images per minibatch
LARGE_BATCH = 2  # of the large photographs: decoding is what is compared
# Height and width, and images of each: made up, with COCO's two longest sides and more landscape than portrait.
MIX = {
    (480, 640): 60, (427, 640): 48, (640, 480): 28, (640, 427): 16, (375, 500): 16, (640, 640): 12, (360, 640): 10,
    (500, 375): 8, (333, 500): 6, (500, 333): 4, (281, 500): 2,
}  # fmt: skip
LARGE = (3000, 4000)  # 12 megapixels


def photograph(height, width, rng):
    """A JPEG of smooth colors under noise, its bytes per pixel about those of a photograph at quality 90."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype="uint8"))
    pixels = np.asarray(coarse.resize((width, height), Image.BICUBIC), "float32")
    pixels = pixels + rng.normal(0, 6, (height, width, 1)).astype("float32")
    encoded = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype("uint8")).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def generated(folder, sizes, boxes=7):
    """A CocoDataset of photographs of these sizes in a folder, with as many boxes an image as COCO has on average."""
    rng = np.random.default_rng(SEED)
    files = [Path(folder) / f"{'x'.join(map(str, size))}_{i}.jpg" for i, size in enumerate(sizes)]
    for file, size in zip(files, sizes, strict=True):
        if not file.exists():
            file.write_bytes(photograph(*size, rng))
    n = len(sizes)
    return coco.CocoDataset(
        categories=coco.Categories((1,), ("thing",)), image_ids=np.arange(n), files=tuple(map(str, files)),
        sizes=np.array(sizes, "int32"), offsets=np.arange(n + 1) * boxes,
        boxes=np.tile(np.array([[20, 30, 150, 200]], "float32"), (n * boxes, 1)),
        labels=np.zeros(n * boxes, "int32"), annotation_file="",
    )  # fmt: skip


def parallel(dataset, config, batch_size=BATCH):
    return training_batches.training_batches(dataset, config, batch_size=batch_size, seed=SEED)


def plain(dataset, config):
    """The same batches as a newcomer to tf.data would write it: one image after the other."""
    canvases, bucket = training_batches.training_canvases(dataset.sizes, config)
    order = TrainingOrder(bucket, BATCH, SEED)
    indices = np.concatenate([order.epoch(number).reshape(-1) for number in range(20)])
    canvas_of, size_of = tf.constant(canvases[bucket]), tf.constant(dataset.sizes)
    read = examples.example_reader(dataset)

    def prepare(index, sample):
        image, truth = read(index)
        return training_batches.augment(
            image, size_of[index], truth, canvas_of[index], config, tf.stack([SEED, sample])
        )

    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False  # they would make the map parallel
    stream = tf.data.Dataset.from_tensor_slices((indices, np.arange(len(indices)))).repeat()
    return stream.map(prepare).batch(BATCH).with_options(options)


def check_equal(streams):
    """Raises unless the streams give the same first batches, bit by bit."""
    for batches in itertools.islice(zip(*streams.values(), strict=True), 2):
        expected, *others = (tf.nest.flatten(batch) for batch in batches)
        for name, found in zip(list(streams)[1:], others, strict=True):
            if not all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True)):
                raise RuntimeError(f"{name}: expected the batches of {next(iter(streams))}, got others")


def measure(streams, batch_size, steps, rounds):
    """{name: (images/s, CPU seconds per image)}, medians of rounds taken in turn; one stream lives at a time."""
    found = {name: [] for name in streams}
    for _ in range(rounds):
        for name, make in streams.items():
            iterator = iter(make())
            for _ in range(6):  # until as many batches are prepared ahead as ever will be, and threads are tuned
                next(iterator)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                next(iterator)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            found[name].append((steps * batch_size / wall, cpu / steps / batch_size))
    return {name: tuple(map(statistics.median, zip(*rows, strict=True))) for name, rows in found.items()}


def resident_mb(field):
    """VmRSS, the memory now, or VmHWM, its peak since the last reset, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"expected {field} in /proc/self/status, which Linux has; found none")


def peak_mb(stream, steps):
    """MB by which this process grows at its peak while a stream runs, its graph and threads included."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident_mb("VmRSS")
    for _ in stream.take(steps):
        pass
    return resident_mb("VmHWM") - before


def peak_mb_of_own_process(name, folder, arguments):
    command = [sys.executable, __file__, "--memory-of", name, "--folder", str(folder)]
    command += ["--data", arguments.data] if arguments.data else []
    for override in arguments.set:
        command += ["--set", override]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{child.stderr}")
    return float(child.stdout.split()[-1])


def waste(sizes, config):
    """{canvases: (their shapes, share of their pixels that is padding)}."""
    content = canvas.resized(sizes, config.short_side, config.max_side)[0].numpy().astype("int64")
    side = int(canvas.padded(content.max()))
    shares = {"a square": ([[side, side]], 1 - content.prod(axis=1).sum() / (len(sizes) * side**2))}
    for count in (1, 2, 3):
        canvases, bucket = training_batches.training_canvases(sizes, dataclasses.replace(config, buckets=count))
        pixels = canvases[bucket].astype("int64").prod(axis=1).sum()
        shares[f"buckets={count}"] = (canvases.tolist(), 1 - content.prod(axis=1).sum() / pixels)
    return shares


def inputs(arguments, folder):
    """(dataset, DataConfig, dataset for reduced decoding)."""
    if arguments.data:
        config = load_config(arguments.data, arguments.set).data
        dataset = dataset_formats.open_split(config, config.train_split, keep_empty=config.keep_empty)
        return dataset, config, dataset
    sizes = [size for size, count in MIX.items() for _ in range(count)]
    return generated(folder, sizes), config_from_dict({}).data, generated(folder, [LARGE] * 8)


def streams_of(dataset, config, large):
    """{name: a function that makes the stream}: those of the dataset, and those that compare decoding."""
    config = dataclasses.replace(config, decode="exact", bad_images="stop")
    return {
        "plain map": lambda: plain(dataset, config),
        "pipeline": lambda: parallel(dataset, config),
        "pipeline, skip": lambda: parallel(dataset, dataclasses.replace(config, bad_images="skip")),
    }, {
        "exact": lambda: parallel(large, config, LARGE_BATCH),
        "reduced": lambda: parallel(large, dataclasses.replace(config, decode="reduced"), LARGE_BATCH),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="CONFIG.json", help="measure the training split of this configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one of its settings")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each stream (3)")
    parser.add_argument("--steps", type=int, default=10, help="batches of a round (10)")
    parser.add_argument("--memory-of", metavar="STREAM", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="where to put the generated JPEGs, and leave them; a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(run(arguments, Path(arguments.folder or temporary)))


def run(arguments, folder):
    """The exit status."""
    dataset, config, large = inputs(arguments, folder)
    small, decoding = streams_of(dataset, config, large)
    if arguments.memory_of:
        print(peak_mb({**small, **decoding}[arguments.memory_of](), steps=8))
        return 0

    cpus = len(os.sched_getaffinity(0))
    print(f"{len(dataset)} images, batches of {BATCH}, {config.short_side}/{config.max_side}, {cpus} CPUs", flush=True)
    check_equal({name: make() for name, make in small.items()})
    print("The streams give equal batches; timing ...", flush=True)
    rows = {}
    for group, batch_size in ((small, BATCH), (decoding, LARGE_BATCH)):
        found = measure(group, batch_size, arguments.steps, arguments.rounds)
        base = found[next(iter(found))]
        rows |= {name: (*row, row[0] / base[0], row[1] / base[1]) for name, row in found.items()}
    print("memory ...\n", flush=True)
    columns = ("images/s", "CPU s/image", "extra MB", "times images/s", "times CPU")
    print(f"{'stream':16}  {'  '.join(f'{column:>14}' for column in columns)}")
    for name, (speed, cpu, faster, dearer) in rows.items():
        if name == "exact":
            what = "the dataset" if arguments.data else f"JPEGs of {LARGE[0]} x {LARGE[1]}"
            print(f"{what}, decoded:")
        peak = peak_mb_of_own_process(name, folder, arguments)
        print(f"{name:16}  {speed:14.1f}  {cpu:14.4f}  {peak:14.0f}  {faster:14.2f}  {dearer:14.2f}", flush=True)

    shares = waste(dataset.sizes, config)
    print("\npadding, share of the canvases' pixels" + ("" if arguments.data else " (a made-up mix of sizes)"))
    for name, (canvases, share) in shares.items():
        shapes = ", ".join("x".join(map(str, canvas)) for canvas in canvases)
        print(f"{name:16}  {share:8.3f}  {shapes}")

    three = shares["buckets=3"][1]
    verdicts = {
        f"the pipeline is {rows['pipeline'][2]:.2f} times as fast as the plain map": rows["pipeline"][2] >= 1,
        "three canvases waste no more than two": three <= shares["buckets=2"][1],
        "three canvases waste no more than a square": three <= shares["a square"][1],
    }
    print()
    for what, holds in verdicts.items():
        print(f"{what}: {'holds' if holds else 'MISSED'}")
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    main()
