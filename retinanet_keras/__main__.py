"""`python -m retinanet_keras VERB`."""

from retinanet_keras.cli import parser

if __name__ == "__main__":
    parser.run()
