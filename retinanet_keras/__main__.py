"""Commands beside training and evaluation: `python -m retinanet_keras VERB`."""

import argparse
import sys

from retinanet_keras import commands


def main():
    parser = argparse.ArgumentParser(prog="python -m retinanet_keras", description=__doc__.split(":")[0] + ".")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("export", help="write a run's model as a SavedModel for TF Serving")
    verb.add_argument("--workdir", required=True, help="folder of the run")
    verb.add_argument("--to", required=True, help="base path; a numbered folder is made in it")
    verb.set_defaults(call=lambda a: commands.export(a.workdir, a.to))

    verb = verbs.add_parser("detect", help="find objects in image files and folders")
    verb.add_argument("--model", required=True, help="folder of a run or of an export")
    verb.add_argument("images", nargs="+", help="image files and folders")
    verb.add_argument("--to", required=True, help="folder for the pictures")
    verb.add_argument("--min-score", type=float, default=0.3, help="of the detections shown (default 0.3)")
    verb.set_defaults(call=lambda a: commands.detect(a.model, a.images, a.to, a.min_score))

    verb = verbs.add_parser("inspect", help="look for faults in a dataset before training on it")
    verb.add_argument("--config", required=True, help="JSON file")
    verb.add_argument("--to", required=True, help="folder for the report and pictures")
    verb.add_argument("--set", action="append", default=[], metavar="key=value", help="such as data.dir=my_data")
    verb.set_defaults(call=lambda a: commands.inspect(a.config, a.to, a.set))

    verb = verbs.add_parser("config", help="list every setting, its default, and the default's source")
    verb.set_defaults(call=lambda a: commands.describe_config())

    args = parser.parse_args()
    return args.call(args)


if __name__ == "__main__":
    sys.exit(commands.run_command(main))
