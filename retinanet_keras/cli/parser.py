"""Command lines: `retinanet-keras VERB`, `python -m retinanet_keras VERB`, `train.py`, `evaluate.py`."""

from __future__ import annotations

import argparse
import zipfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from retinanet_keras import config, config_schema, errors, runtime
from retinanet_keras.cli import process
from retinanet_keras.experiments import tables
from retinanet_keras.storage import disk, strict_json


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Parse the arguments, those of the process unless given, and run a command; its exit status."""
    parser = argparse.ArgumentParser(prog="retinanet-keras", description="RetinaNet: train, evaluate, detect, export.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    add_train(verbs.add_parser("train", help="train a RetinaNet, or resume a run"))
    add_evaluate(verbs.add_parser("evaluate", help="COCO metrics of a run, weights, an export or a results file"))

    verb = verbs.add_parser("export", help="write a model as a SavedModel for TF Serving")
    model = verb.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="folder of the run")
    model.add_argument("--weights", help="a .keras file")
    verb.add_argument("--to", help="base path; a numbered folder is created in it")
    verb.add_argument("--onnx", metavar="FILE", help="ONNX file to write, too; without --to, only this")
    verb.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="precision of convolutions (default: the model's)"
    )
    verb.set_defaults(call=export, error=verb.error)

    verb = verbs.add_parser("detect", help="detect objects in image files and folders")
    verb.add_argument("--model", required=True, help="folder of a run or of an export, or a .keras file")
    verb.add_argument("images", nargs="+", help="image files and folders")
    verb.add_argument("--to", required=True, help="folder for the pictures")
    verb.add_argument("--min-score", type=float, default=0.3, help="of the detections shown (default 0.3)")
    verb.set_defaults(call=detect)

    verb = verbs.add_parser("client", help="detect objects in image files with a TF Serving server")
    verb.add_argument("images", nargs="+", help="image files and folders")
    verb.add_argument("--server", required=True, help="grpc://HOST:8500 or http://HOST:8501")
    verb.add_argument("--model", required=True, help="name of the model on the server")
    verb.add_argument("--version", type=int, help="version of the model (default: the server's choice, the newest)")
    verb.add_argument(
        "--signature", choices=("bytes", "images"), default="bytes", help="send files (default) or pixels"
    )
    verb.add_argument("--batch", type=int, default=1, help="images per request (default 1)")
    verb.add_argument("--to", required=True, help="folder for the pictures and detections.json")
    verb.add_argument(
        "--repeat", type=int, default=0, help="send all images this many more times and report the latency"
    )
    verb.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for a response (default 60)")
    verb.add_argument("--min-score", type=float, default=0.3, help="of the detections shown (default 0.3)")
    verb.set_defaults(call=client)

    verb = verbs.add_parser("inspect", help="check a dataset for errors before training on it")
    verb.add_argument("--config", required=True, help="JSON file")
    verb.add_argument("--to", required=True, help="folder for the report and pictures")
    add_settings(verb, "such as data.dir=my_data")
    verb.set_defaults(call=inspect)

    verb = verbs.add_parser("convert", help="convert weights of Detectron, Detectron2 or torchvision to a Keras file")
    verb.add_argument("file", help="the .pkl, .pth or .npz file")
    verb.add_argument("out", help="the .keras file to write; a .weights.h5 file for a backbone alone")
    verb.set_defaults(call=convert)

    verb = verbs.add_parser("replay", help="replay a training step that was not finite, image by image")
    verb.add_argument("file", help="the .npz file written by training")
    verb.set_defaults(call=replay)

    add_figures(verbs.add_parser("figure", help="reproduce a figure of the paper, as a picture and its numbers"))

    verb = verbs.add_parser("config", help="list every setting, its default, and the default's source")
    verb.set_defaults(call=list_settings)

    verb = verbs.add_parser("experiments", help="train the rows of a table of the paper, and compare the results")
    verb.add_argument("name", choices=tables.NAMES, help="name of the table; text: results given in the running text")
    verb.add_argument("--scale", choices=tables.SCALES, default="small", help="default: small, for two CPU cores")
    verb.add_argument("--only", nargs="+", default=[], metavar="ROW", help="train only these rows or groups of rows")
    verb.add_argument("--seeds", type=int, default=1, help="runs per row (default 1)")
    verb.add_argument("--dry-run", action="store_true", help="only print one line for each row")
    verb.add_argument(
        "--time",
        action="store_true",
        help="with 1e: time the ten models of the paper on this machine, without training",
    )
    verb.add_argument("--to", help="folder; default: runs/experiments/ and the scale")
    add_settings(verb, "for all rows, such as data.dir=coco")
    verb.set_defaults(call=experiments)

    args = parser.parse_args(arguments)
    return args.call(args)


def run() -> None:
    """Entry point of the console script."""
    process.run_command(main)


def run_train() -> None:
    """Entry point of `train.py`."""
    process.run_command(lambda: _only(add_train, "Train a RetinaNet; run it again to resume a run."))


def run_evaluate() -> None:
    """Entry point of `evaluate.py`."""
    process.run_command(lambda: _only(add_evaluate, "Evaluate a run, weights, an export or a results file."))


def _only(add: Callable[[ArgumentParser], None], description: str) -> int | None:
    parser = argparse.ArgumentParser(description=description)
    add(parser)
    args = parser.parse_args()
    return args.call(args)


def add_train(parser: ArgumentParser) -> None:
    """Add the arguments of `train`."""
    parser.add_argument("--config", required=True, help="JSON file with differences from the paper's settings")
    parser.add_argument("--workdir", help="folder of the run; default: runs/ and the configuration's name")
    add_settings(parser, "such as train.batch_size=4")
    parser.set_defaults(call=train)


def add_evaluate(parser: ArgumentParser) -> None:
    """Add the arguments of `evaluate`."""
    parser.add_argument("--config", default="configs/r101_800.json", help="default: configs/r101_800.json")
    parser.add_argument("--workdir", help="folder of the run; default: runs/ and the configuration's name")
    parser.add_argument("--split", help="default: the configuration's test split")
    add_settings(parser, "such as data.dir=my_data")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--weights", metavar="FILE", help="a .keras or .weights.h5 file in place of the run's weights")
    what.add_argument("--export", metavar="DIR", help="an exported SavedModel in place of the run's weights")
    what.add_argument("--results", metavar="FILE", help="detections in COCO's results format; needs no run")
    parser.set_defaults(call=evaluate)


def add_settings(parser: ArgumentParser, example: str) -> None:
    """Add `--set`, for overrides of settings; `example` is its help."""
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="key=value", help=example)


def add_figures(verb: ArgumentParser) -> None:
    """Add the arguments of `figure`, a subcommand for each figure."""
    numbers = verb.add_subparsers(required=True, metavar="N", dest="number")

    def add(number: int, help: str) -> ArgumentParser:
        parser = numbers.add_parser(str(number), help=help)
        parser.add_argument("--to", default="figures", help="folder to write to (default figures)")
        parser.set_defaults(call=figure)
        return parser

    def add_config(parser: ArgumentParser, default: str) -> None:
        parser.add_argument("--config", default=default, help=f"JSON file (default {default})")
        add_settings(parser, "such as anchors.size=2")

    add(1, "focal loss against p_t")
    one = add(2, "time per image against AP")
    one.add_argument("--runs", help="folder of evaluated runs, or of `experiments 1e`, to draw next to the paper's")
    one = add(3, "the network, drawn from the model")
    add_config(one, "configs/r50_600.json")
    one.add_argument("--classes", type=int, default=80, help="number of object classes (default 80)")
    one = add(4, "cumulative distribution of the loss of a trained run")
    one.add_argument("--run", required=True, help="folder of the run")
    one.add_argument("--split", help="default: the training split")
    one.add_argument("--images", type=int, help="default: until there are 10^7 negatives and 10^5 positives")
    add_settings(one, "such as data.dir=D")
    add(5, "FL, FL* and CE against x_t")
    add(6, "their derivatives")
    one = add(7, "which settings of FL* work, from a folder of runs")
    one.add_argument("--runs", required=True, help="folder of the runs; commands for missing ones are printed")
    add_config(one, "configs/shapes.json")


def train(args: Namespace) -> None:
    """Run `train`."""
    loaded = config.load_config(args.config, args.set)
    process.import_tensorflow(runtime.work_of(loaded.model.backbone, loaded.model.width))
    from retinanet_keras.training import run

    run.train(loaded, args.workdir or Path("runs") / Path(args.config).stem)


def evaluate(args: Namespace) -> None:
    """Run `evaluate`."""
    process.import_tensorflow()
    from retinanet_keras.cli.evaluate import evaluate

    evaluate(args.config, args.workdir, args.split, args.set, args.weights, args.export, args.results)


def export(args: Namespace) -> int:
    """Run `export`."""
    if not (args.to or args.onnx):
        args.error("expected --to, --onnx, or both")
    process.import_tensorflow()
    from retinanet_keras.cli import commands

    return commands.export(args.to, args.workdir, args.weights, args.precision, args.onnx)


def detect(args: Namespace) -> int:
    """Run `detect`."""
    process.import_tensorflow()
    from retinanet_keras.cli import commands

    return commands.detect(args.model, args.images, args.to, args.min_score)


def client(args: Namespace) -> int:
    """Run `client`."""
    from retinanet_keras.serving import client  # without TensorFlow

    options = {key: value for key, value in vars(args).items() if key != "call"}
    return client.run(**options)


def inspect(args: Namespace) -> int:
    """Run `inspect`."""
    loaded = config.load_config(args.config, args.set)
    disk.check_folder(args.to, "--to")
    process.import_tensorflow()
    from retinanet_keras.dataset_check import inspection

    return int(bool(inspection.inspect(loaded, args.to)["errors"]))


def convert(args: Namespace) -> None:
    """Run `convert`."""
    process.import_tensorflow()
    from retinanet_keras import checkpoints

    print(checkpoints.convert(args.file, args.out))


def work_of_step(file: str | Path) -> str:
    """Return the kind of work of a failed step, so that it is replayed with the same kernels."""
    import numpy as np

    try:
        with np.load(file) as arrays:
            model = strict_json.parse(str(arrays["about"]))["config"]["model"]
        return runtime.work_of(model["backbone"], model["width"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return runtime.OTHER  # `replay` reads it again and reports what is wrong


def replay(args: Namespace) -> int:
    """Run `replay`."""
    process.import_tensorflow(work_of_step(args.file))
    from retinanet_keras.cli import commands

    return commands.replay(args.file)


def experiments(args: Namespace) -> None:
    """Run `experiments`."""
    if args.seeds < 1:
        raise errors.ConfigError(f"--seeds: expected at least 1, got {args.seeds}")
    if args.time and args.name != "1e":
        raise errors.ConfigError(f"--time: expected table 1e, got {args.name}")
    to = Path(args.to or f"runs/experiments/{args.scale}")
    disk.check_folder(to, "--to")
    from retinanet_keras.experiments import results_page, runner, timing

    if args.dry_run:
        print("\n".join(runner.plan(args.name, args.scale, only=args.only, overrides=args.set)))
    elif args.time:
        process.import_tensorflow()
        timing.measure(to / "1e", only=args.only)
        print(results_page.write(to / "1e", "1e", args.scale))
    else:
        runner.run_table(args.name, args.scale, to, only=args.only, seeds=args.seeds, overrides=args.set)


def figure(args: Namespace) -> None:
    """Run `figure`."""
    disk.check_folder(args.to, "--to")
    process.import_tensorflow()
    from retinanet_keras.experiments.figures import architecture, distribution, loss_curves, speed, star

    if args.number == "2":
        speed.figure2(args.to, args.runs)
    elif args.number == "3":
        architecture.figure3(args.to, config.load_config(args.config, args.set), args.classes)
    elif args.number == "4":
        distribution.figure4(args.to, args.run, args.split, args.images, args.set)
    elif args.number == "7":
        star.figure7(args.to, args.runs, args.config, args.set)
    else:
        {"1": loss_curves.figure1, "5": loss_curves.figure5, "6": loss_curves.figure6}[args.number](args.to)


def list_settings(args: Namespace) -> None:
    """Run `config`."""
    for key, default, doc, source in config_schema.describe(config.Config):
        print(f"{key} = {default}\n    {doc} [{source}]")
