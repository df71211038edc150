"""Errors that the command lines show as a message, without a traceback."""

from __future__ import annotations

import re
import signal


class UserError(ValueError):
    """An error that the user can fix; its message says how."""


class RunError(UserError):
    """A run that cannot continue; the message says why, what is saved, and what to do."""


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the key, what was expected and what was given."""


class DataError(UserError):
    """A dataset that cannot be used; the message names the file, the invalid entries and what to do."""


class InUse(UserError):
    """A folder that is in use by another process; the message says which."""


class OnnxError(UserError):
    """An ONNX file that cannot be written."""


class ServerError(UserError):
    """A server that is unavailable, lacks the model, or times out; the failure is not specific to an image."""


class Interrupted(KeyboardInterrupt):
    """A process ended by a signal.

    Args:
        number: int. Number of the signal.
        message: str. What is saved, as a sentence.
    """

    def __init__(self, number: int, message: str = ""):
        super().__init__(message or "Only the work since the last message was lost")
        self.name = signal.Signals(number).name
        self.status = 128 + number  # the exit status that shells and schedulers expect


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without the names of graph nodes that TensorFlow adds."""
    message = getattr(error, "message", None) or str(error)
    return re.sub(r"\{\{.*?\}\}", "", message).strip().split("\n")[0].split(" [Op:")[0]
