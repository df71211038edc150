"""Shared by the command lines: errors that a user can fix are printed in one line, without a traceback."""

import logging
import os
import signal
import sys

from retinanet_keras import runtime
from retinanet_keras.errors import Interrupted, UserError
from retinanet_keras.storage.printable import printable

# A full or read-only disk, in the words that Python's, TensorFlow's and HDF5's errors share.
REFUSALS = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied")
LAYOUT = "\n\t"  # control characters of messages themselves


class _Formatter(logging.Formatter):
    """Messages may name files and classes, in which there may be what a terminal obeys."""

    def format(self, record):
        return printable(super().format(record), keep=LAYOUT)


def import_tensorflow(work=runtime.OTHER):
    """Import TensorFlow, set up for some work, without its start-up notes, most of which no setting silences.

    It takes seconds, so commands call this once their arguments have been read and checked.

    Args:
        work: see `runtime.set_up`.
    """
    runtime.set_up(work)
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import tensorflow  # noqa: F401
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def run_command(main):
    """Run a command and exit with its status: 2 after a UserError; anything unforeseen keeps its traceback."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    for stream in (sys.stdout, sys.stderr):  # a name may have letters that the terminal has not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {printable(error, keep=LAYOUT)}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"{stop.name}: {printable(stop, keep=LAYOUT)}", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process even where a read hangs
        sys.exit(stop.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        refusal = next((words for words in REFUSALS if words in str(error)), None)
        if refusal is None:
            raise
        first = printable(str(error).strip().split("\n")[0])
        print(f"error: the disk refuses: {first}. Files written before are as they were", file=sys.stderr)
        sys.exit(2)
