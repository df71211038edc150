"""Run a command: import TensorFlow quietly, and print errors that a user can fix without a traceback."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

from retinanet_keras import runtime
from retinanet_keras.errors import Interrupted, UserError
from retinanet_keras.storage.printable import printable

# A full or read-only disk, in the words shared by errors of Python, TensorFlow and HDF5
REFUSALS = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied")
LAYOUT = "\n\t"  # control characters that messages use


class _Formatter(logging.Formatter):
    """Escape control characters, which names of files and classes in a message may contain."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep=LAYOUT)


def import_tensorflow(work: str = runtime.OTHER) -> None:
    """Import TensorFlow, set up for a kind of work, without its start-up messages.

    No setting silences most of these. The import takes seconds, so commands call this once their arguments are checked.

    Args:
        work: str. See `runtime.set_up`.
    """
    runtime.set_up(work)
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import tensorflow  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command and exit with its status: 2 after a UserError; unexpected errors keep their traceback."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    for stream in (sys.stdout, sys.stderr):  # names may have characters that the terminal cannot show
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
        print(
            f"error: writing to the disk failed: {first}. Files written before are unchanged. Free some space or "
            "change the permissions",
            file=sys.stderr,
        )
        sys.exit(2)
