"""Train a RetinaNet: `python train.py --config configs/r101_800.json`."""

import argparse
from pathlib import Path

from retinanet_keras import runtime
from retinanet_keras.cli.process import import_tensorflow, run_command
from retinanet_keras.config import load_config


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + "; run again after a kill, it goes on.")
    parser.add_argument("--config", required=True, help="JSON file of what differs from the paper's settings")
    parser.add_argument("--workdir", help="folder of the run; default: runs/ and the configuration's name")
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="key=value", help="such as train.batch_size=4"
    )
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    import_tensorflow(runtime.work_of(config.model.backbone, config.model.width))
    from retinanet_keras.training.run import train

    train(config, args.workdir or Path("runs") / Path(args.config).stem)


if __name__ == "__main__":
    run_command(main)
