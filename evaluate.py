"""Evaluate a run, weights, an export or a results file: `python evaluate.py --split minival`."""

import argparse

from retinanet_keras.cli.process import import_tensorflow, run_command


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ", by COCO's metrics.")
    parser.add_argument("--config", default="configs/r101_800.json", help="default: configs/r101_800.json")
    parser.add_argument("--workdir", help="folder of the run; default: runs/ and the configuration's name")
    parser.add_argument("--split", help="default: the configuration's test split")
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="key=value", help="such as data.dir=my_data"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--weights", metavar="FILE", help="a .keras or .weights.h5 file in place of the run's weights")
    what.add_argument("--export", metavar="DIR", help="an exported SavedModel in place of the run's weights")
    what.add_argument("--results", metavar="FILE", help="detections in COCO's results format; needs no run")
    args = parser.parse_args()
    import_tensorflow()
    from retinanet_keras.cli.evaluate import evaluate

    evaluate(args.config, args.workdir, args.split, args.set, args.weights, args.export, args.results)


if __name__ == "__main__":
    run_command(main)
