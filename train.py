"""Train a RetinaNet: `python train.py --config configs/r101_800.json`."""

import argparse

from retinanet_keras import commands


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + "; run again after a kill, it goes on.")
    parser.add_argument("--config", required=True, help="JSON file of what differs from the paper's settings")
    parser.add_argument("--workdir", help="folder of the run; default: runs/ and the configuration's name")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="such as train.batch_size=4")
    args = parser.parse_args()
    commands.train(args.config, args.workdir, args.set)


if __name__ == "__main__":
    commands.run_command(main)
