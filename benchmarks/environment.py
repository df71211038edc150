"""The default set-up of the process against every other: TensorFlow's kernels or oneDNN's, memory freed or kept.

    python benchmarks/environment.py [--rounds N] [--only NAME ...] [--bccd DIR]

Five kinds of work: 60 training steps of `configs/shapes.json` and of `configs/bccd.json` with their own input
pipelines, in turns of 12; a training step of the paper's R50, 2 images of 512 x 512; the exported R50 of 80 classes,
one image of 512 x 512 and of 800 x 1344. Each in processes that differ in their environment alone: what
`retinanet_keras.runtime` chooses for that work, as a command does; the four combinations of TF_ENABLE_ONEDNN_OPTS 0 and
1 with glibc's memory as it is and kept; and nothing set at all, as TensorFlow is without this package. The processes
take turns, and medians are compared. The default is one of the four combinations: what the two differ by is noise, and
printed; their mean is compared with the others.

The exit status is 1 where the default takes more than 1.05 of the best of the four in CPU seconds or in time, or where
the shapes training is not 1.8 times as fast as with nothing set, on an x86-64 processor on which TensorFlow leaves
oneDNN off. Without `--bccd` (the folder of https://github.com/Shenggan/BCCD_Dataset in COCO's layout) its images are
generated. 25 minutes on two CPU cores.
"""

import retinanet_keras  # noqa: F401

# isort: split

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from turns import Process, judge, tell, timed

from retinanet_keras import runtime

ROOT = Path(__file__).parents[1]
SHAPES, BCCD, STEP, EXPORT, LARGE = "shapes", "bccd", "r50 step", "export 512x512", "export 800x1344"
WORKS = (SHAPES, BCCD, STEP, EXPORT, LARGE)
REPEAT = {SHAPES: 12, BCCD: 12}  # steps in a turn
WARM_UP = 3
DEFAULT, NOTHING = "default", "nothing set"
KEPT, AS_IS = {runtime.SWITCH: None}, {runtime.SWITCH: "off"}
ENVIRONMENTS = {
    DEFAULT: {runtime.KERNELS: None, **KEPT},
    "TensorFlow's, as it is": {runtime.KERNELS: "0", **AS_IS},
    "TensorFlow's, kept": {runtime.KERNELS: "0", **KEPT},
    "oneDNN, as it is": {runtime.KERNELS: "1", **AS_IS},
    "oneDNN, kept": {runtime.KERNELS: "1", **KEPT},
    NOTHING: {runtime.KERNELS: None, **AS_IS},
}
NEAR, FASTER = 1.05, 1.8


def training_steps(name, folder, bccd):
    """A function that trains a step of `configs/NAME.json`, by the run's own model and input pipeline."""
    import keras
    import tensorflow as tf

    from retinanet_keras.config import load_config
    from retinanet_keras.data import dataset_formats
    from retinanet_keras.training.batches import Stream
    from retinanet_keras.training.build import build_model

    overrides = [f"data.dir={bccd}"] if name == BCCD and bccd else [f"data.dir={folder}/shapes"]
    if name == BCCD and not bccd:
        overrides += ["data.source=shapes"]
    config = load_config(ROOT / f"configs/{name}.json", overrides)
    keras.utils.set_random_seed(0)
    train_set = dataset_formats.open_split(config.data, config.data.train_split, keep_empty=config.data.keep_empty)
    model = build_model(config, train_set.categories, None)
    model.optimizer.build(model.trainable_variables)
    step = tf.function(model.train_step, reduce_retracing=True)
    batches = iter(Stream(train_set, config).batches(0, None, (0, 1), 1))
    return lambda: float(step(next(batches))["loss"])


def r50_step():
    """A function that trains a step of the paper's R50 on two random images."""
    import tensorflow as tf
    import train_step

    model, _, images = train_step.our_model(train_step.SHIPS)
    model.optimizer.build(model.trainable_variables)
    step = tf.function(model.train_step)
    batch = images, {name: tf.constant(value) for name, value in train_step.make_batch()[1].items()}
    return lambda: float(step(batch)["loss"])


def export_call(size, folder):
    import inference

    os.environ["BENCHMARK_THREADS"] = "0"  # TensorFlow's own choice
    run = inference.saved_model(f"{folder}/{size}-float32/1", "serving_default", {})
    pixels = inference.image(*map(int, size.split("x")))
    return lambda: run(pixels)


def child(work, folder, bccd):
    """In a process of its own: some calls at each line of stdin; tells of their seconds."""
    runtime.set_up(runtime.LARGE_TRAINING if work == STEP else runtime.OTHER)
    if work == "exports":
        import inference

        return inference.write_exports(folder, ",".join(inference.SIZES))
    if work in (SHAPES, BCCD):
        call = training_steps(work, folder, bccd)
    else:
        call = r50_step() if work == STEP else export_call(work.split()[1], folder)
    for _ in range(WARM_UP):
        call()
    tell(processor=runtime.processor(), onednn=os.environ.get(runtime.KERNELS, "0" if left_off() else "1"))
    while sys.stdin.readline():
        tell(**timed(call, REPEAT.get(work, 1)))


def left_off():
    """Whether this is a processor on which TensorFlow leaves oneDNN off."""
    return runtime.preferred_kernels(runtime.OTHER) is not None


def compare(work, rounds, folder, bccd):
    """({environment: {"seconds", "busy", "peak"}}, medians of the turns; the environment that the default chooses)."""
    processes, turns = {}, {name: [] for name in ENVIRONMENTS}
    try:
        for name, variables in ENVIRONMENTS.items():
            chosen = dict.fromkeys((runtime.CHOSEN, *runtime.THREADS))
            process = processes[name] = Process(__file__, work, folder, bccd, **chosen, **variables)
            told = process.expect()
            if name == DEFAULT:
                print(f"{work}: {told['processor']}", flush=True)
                twin = "oneDNN, kept" if told["onednn"] == "1" else "TensorFlow's, kept"
        for _ in range(rounds):
            for name, process in processes.items():
                turns[name].append(process.go_on())
    finally:
        for process in processes.values():
            process.end()
    medians = {
        name: {part: statistics.median(turn[part] for turn in told) for part in ("seconds", "busy", "peak")}
        for name, told in turns.items()
    }
    return medians, twin


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each process (5)")
    parser.add_argument("--only", nargs="+", default=WORKS, choices=WORKS, metavar="NAME", help=", ".join(WORKS))
    parser.add_argument("--bccd", default="", help="folder of BCCD in COCO's layout (default: generated images)")
    args = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        if {EXPORT, LARGE} & set(args.only):
            process = Process(__file__, "exports", folder, "")
            process.expect()
            process.end()
        for work in args.only:
            found, twin = compare(work, args.rounds, folder, args.bccd)
            for name, told in found.items():
                print(f"  {name:24} {told['seconds']:7.3f} s  {told['busy']:7.3f} CPU s  {told['peak']:6.0f} MB peak")
            four = [told for name, told in found.items() if name not in (DEFAULT, NOTHING)]
            for part, words in (("busy", "CPU seconds"), ("seconds", "time")):
                noise = found[DEFAULT][part] / found[twin][part]
                print(f'  {words}: the default and "{twin}" are one set-up, and differ by {noise - 1:+.1%}')
                default = (found[DEFAULT][part] + found[twin][part]) / 2
                best = min(default, *(told[part] for told in four if told is not found[twin]))
                missed += judge(f"  {work}: {words}, default / the best", default / best, NEAR)
            if work == SHAPES and left_off():
                faster = 2 * found[NOTHING]["seconds"] / (found[DEFAULT]["seconds"] + found[twin]["seconds"])
                missed += judge(f"  {work}: how much faster than with nothing set", faster, FASTER, at_least=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
