"""Errors that the command lines show as a message, without a traceback."""

import re
import signal


class UserError(ValueError):
    """An error that the user can fix; its message says how."""


class Interrupted(KeyboardInterrupt):
    """A run ended by a signal. Args: the signal's number; what is saved, as a sentence."""

    def __init__(self, number, message=""):
        super().__init__(message or "Nothing was lost but the work since the last message")
        self.name = signal.Signals(number).name
        self.status = 128 + number  # what shells and schedulers expect


def first_line(error):
    """What an error says, without the names of graph nodes that TensorFlow adds."""
    message = getattr(error, "message", None) or str(error)
    return re.sub(r"\{\{.*?\}\}", "", message).strip().split("\n")[0].split(" [Op:")[0]
