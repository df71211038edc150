"""Evaluate a run, weights, an export or a results file: `python evaluate.py --split minival`."""

from retinanet_keras.cli import parser

if __name__ == "__main__":
    parser.run_evaluate()
