"""Errors that the command lines show as a message, without a traceback."""

import re
import signal


class UserError(ValueError):
    """An error that the user can fix; its message says how."""


class RunError(UserError):
    """A run that cannot go on; the message says why, what is safe, and what to do."""


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the key, what was expected and what came."""


class DataError(UserError):
    """A dataset that cannot be used; the message names the file, the offenders and what to do."""


class InUse(UserError):
    """A folder that another process works in; the message says which."""


class OnnxError(UserError):
    """An ONNX file that cannot be made."""


class ServerError(UserError):
    """The server is not there, has not the model, or does not answer in time: no other image would fare better."""


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
