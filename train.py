"""Train a RetinaNet: `python train.py --config configs/r101_800.json`."""

from retinanet_keras.cli import parser

if __name__ == "__main__":
    parser.run_train()
