"""What the command lines share: errors that a user can mend come in one line, without a traceback."""

import errno
import logging
import os
import sys

from retinanet_keras.config import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)  # a disk that is full or refuses


def import_tensorflow():
    """Import TensorFlow without its start-up notes, most of which no setting silences.

    It takes seconds, so commands call this once their arguments have been read and checked.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
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
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        print(f"error: {error}. What was written before is as it was", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
