"""Commands beside training and evaluation: `python -m retinanet_keras VERB`."""

import argparse

from retinanet_keras import cli, config, settings


def main():
    parser = argparse.ArgumentParser(prog="python -m retinanet_keras", description=__doc__.split(":")[0] + ".")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verb = verbs.add_parser("export", help="write a model as a SavedModel for TF Serving")
    model = verb.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="folder of the run")
    model.add_argument("--weights", help="a .keras file")
    verb.add_argument("--to", required=True, help="base path; a numbered folder is made in it")
    verb.set_defaults(call=export)

    verb = verbs.add_parser("detect", help="find objects in image files and folders")
    verb.add_argument("--model", required=True, help="folder of a run or of an export, or a .keras file")
    verb.add_argument("images", nargs="+", help="image files and folders")
    verb.add_argument("--to", required=True, help="folder for the pictures")
    verb.add_argument("--min-score", type=float, default=0.3, help="of the detections shown (default 0.3)")
    verb.set_defaults(call=detect)

    verb = verbs.add_parser("inspect", help="look for faults in a dataset before training on it")
    verb.add_argument("--config", required=True, help="JSON file")
    verb.add_argument("--to", required=True, help="folder for the report and pictures")
    verb.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="key=value", help="such as data.dir=my_data"
    )
    verb.set_defaults(call=inspect)

    verb = verbs.add_parser("convert", help="turn weights of Detectron, Detectron2 or torchvision into a Keras file")
    verb.add_argument("file", help="the .pkl, .pth or .npz")
    verb.add_argument("out", help="a .keras file to write; for a backbone alone a .weights.h5 file")
    verb.set_defaults(call=convert)

    verb = verbs.add_parser("replay", help="compute a training step that was not finite again, image by image")
    verb.add_argument("file", help="the .npz that training wrote")
    verb.set_defaults(call=replay)

    add_figures(verbs.add_parser("figure", help="a figure of the paper, as a picture and its numbers"))

    verb = verbs.add_parser("config", help="list every setting, its default, and the default's source")
    verb.set_defaults(call=list_settings)

    args = parser.parse_args()
    return args.call(args)


def add_figures(verb):
    numbers = verb.add_subparsers(required=True, metavar="N", dest="number")

    def add(number, help):
        parser = numbers.add_parser(str(number), help=help)
        parser.add_argument("--to", default="figures", help="folder to write to (default figures)")
        parser.set_defaults(call=figure)
        return parser

    def add_config(parser, default):
        parser.add_argument("--config", default=default, help=f"JSON file (default {default})")
        parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="key=value")

    add(1, "focal loss against p_t")
    one = add(2, "time of an image against AP")
    one.add_argument("--runs", help="folder of evaluated runs to measure, beside the paper's numbers")
    one = add(3, "the network, drawn from the model")
    add_config(one, "configs/r50_600.json")
    one.add_argument("--classes", type=int, default=80, help="K (default 80)")
    one = add(4, "cumulative distribution of the loss of a trained run")
    one.add_argument("--run", required=True, help="folder of the run")
    one.add_argument("--split", help="default: the one it was trained on")
    one.add_argument("--images", type=int, help="default: until there are 10^7 negatives and 10^5 positives")
    one.add_argument("--set", action="extend", nargs="+", default=[], metavar="key=value", help="such as data.dir=D")
    add(5, "FL, FL* and CE against x_t")
    add(6, "their derivatives")
    one = add(7, "which settings of FL* work, from a folder of runs")
    one.add_argument("--runs", required=True, help="folder of the runs; those that are missing are listed")
    add_config(one, "configs/shapes.json")


def export(args):
    cli.import_tensorflow()
    from retinanet_keras import commands

    return commands.export(args.to, args.workdir, args.weights)


def detect(args):
    cli.import_tensorflow()
    from retinanet_keras import commands

    return commands.detect(args.model, args.images, args.to, args.min_score)


def inspect(args):
    loaded = config.load_config(args.config, args.set)
    cli.import_tensorflow()
    from retinanet_keras.data import inspection

    return int(bool(inspection.inspect(loaded, args.to)["errors"]))


def convert(args):
    cli.import_tensorflow()
    from retinanet_keras import checkpoints

    print(checkpoints.convert(args.file, args.out))


def replay(args):
    cli.import_tensorflow()
    from retinanet_keras import commands

    return commands.replay(args.file)


def figure(args):
    cli.import_tensorflow()
    from retinanet_keras.experiments.figures import architecture, curves, distribution, speed, star

    if args.number == "2":
        speed.figure2(args.to, args.runs)
    elif args.number == "3":
        architecture.figure3(args.to, config.load_config(args.config, args.set), args.classes)
    elif args.number == "4":
        distribution.figure4(args.to, args.run, args.split, args.images, args.set)
    elif args.number == "7":
        star.figure7(args.to, args.runs, args.config, args.set)
    else:
        {"1": curves.figure1, "5": curves.figure5, "6": curves.figure6}[args.number](args.to)


def list_settings(args):
    for key, default, doc, source in settings.describe(config.Config):
        print(f"{key} = {default}\n    {doc} [{source}]")


if __name__ == "__main__":
    cli.run_command(main)
