"""Predict requests to a TF Serving server, one at a time, over gRPC or REST.

REST bodies follow TF Serving's "RESTful API" page: columnar `inputs`, binary values as {"b64": ...}, errors in `error`.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import numpy.typing as npt

from retinanet_keras.errors import ServerError, UserError
from retinanet_keras.serving import answers, pictures
from retinanet_keras.storage import strict_json
from retinanet_keras.storage.printable import printable

Inputs = dict[str, list[bytes] | npt.NDArray]
Predict = Callable[[str, Inputs], Any]
MakeError = Callable[[str, str], UserError]  # of a gRPC code and the server's message
METHOD = "/tensorflow.serving.PredictionService/Predict"
# The gRPC code behind an HTTP status, where TF Serving's REST interface has one for it.
CODES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
SHOWN = 300  # characters of a server's message
PIECE = 4096  # pixels of a row that are encoded as JSON at once


class Refused(UserError):
    """The server rejects the input (INVALID_ARGUMENT): bytes that are no image, or input for another model."""


@contextlib.contextmanager
def connect(
    server: str, model: str, *, version: int | None = None, timeout: float = 60.0
) -> Iterator[Callable[[str, Inputs], dict[str, npt.NDArray]]]:
    """A connection to a server, as a context manager; not thread-safe.

    Args:
        server: str. grpc://host:port or http://host:port.
        model: str. Name of the model on the server.
        version: int. None for the server's choice.
        timeout: float. Seconds for one request; over REST, for each blocking operation in it.

    Yields:
        a function from (signature, {input: list of bytes, or array}) to the dict of `export.signatures`, as NumPy
        arrays; names are str. Boxes are checked to be within their images, if the headers of encoded images tell their
        sizes.

    Raises:
        UserError: if `server` is not such an address. The function raises Refused and ServerError.
    """
    protocol, target = _address(server)
    _check_name(model, version)

    def error(code, detail):
        detail = " ".join(detail.split("[[{{")[0].split())  # without TensorFlow's names of graph nodes
        detail = printable(detail[:SHOWN]) + ("..." if len(detail) > SHOWN else "")
        return _error(code, detail, server, model, version, timeout)

    with protocol(target, model, version, timeout, error) as predict:

        def detect(signature, inputs):
            (sent,) = inputs.values()
            sizes = [pictures.size_of(item) for item in sent] if isinstance(sent, list) else sent.shape[1:3]
            try:
                return answers.checked(predict(signature, inputs), len(sent), sizes)
            except answers.BadAnswer as problem:
                raise ServerError(
                    f"The response of {server} is not from a RetinaNet exported by this package: {problem}. Check the "
                    "name of the model, and that nothing else is served at this port"
                ) from None

        yield detect


def _address(server: str) -> tuple[Callable[..., Any], str]:
    """(_grpc or _rest, "host:port"). Anything else is not shown in the message: it may contain a password or key."""
    match = re.fullmatch(r"(grpc|http)://((?:[\w.-]+|\[[\w:.%]+\]):([0-9]{1,5}))/?", server, re.IGNORECASE)
    if not match or not 0 < int(match[3]) < 2**16:
        scheme = re.match("(grpcs?|https?)://", server, re.IGNORECASE)
        got = f"{scheme[0]}..." if scheme else "something else"
        raise UserError(
            f"--server: expected grpc://HOST:8500 or http://HOST:8501, got {got} (not shown: it may contain a "
            "password). Give only a host and a port: passwords and paths cannot be sent"
        )
    return (_grpc if match[1].lower() == "grpc" else _rest), match[2]


def _check_name(model: str, version: int | None) -> None:
    try:
        model.encode()
    except UnicodeEncodeError:
        raise UserError(f"--model: expected a name in UTF-8, got {model!r}. Name it as the server does") from None
    if version is not None and not 0 <= version < 2**63:
        raise UserError(f"--version: expected 0 to {2**63 - 1}, got another number. Leave it out for the newest")


@contextlib.contextmanager
def _grpc(target: str, model: str, version: int | None, timeout: float, error: MakeError) -> Iterator[Predict]:
    import grpc  # takes a tenth of a second, which REST does not need

    from retinanet_keras.serving import messages

    # gRPC's default limit is 4 MB; TF Serving has none.
    limits = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", answers.MOST_BYTES)]
    with grpc.insecure_channel(target, options=limits) as channel:
        call = channel.unary_unary(
            METHOD, messages.PredictRequest.SerializeToString, messages.PredictResponse.FromString
        )

        def predict(signature, inputs):
            try:
                response = call(messages.request(model, version, signature, inputs), timeout=timeout)
            except grpc.RpcError as failure:
                raise error(failure.code().name, failure.details() or "") from None
            tensors = {output.key: output.value for output in response.outputs}
            shapes = {name: tuple(d.size for d in tensor.tensor_shape.dim[:9]) for name, tensor in tensors.items()}
            (sent,) = inputs.values()
            answers.check_shapes(shapes, len(sent))  # first, as a few bytes can claim any shape
            try:
                return {name: messages.to_array(tensors[name], answers.MOST_VALUES) for name in answers.OUTPUTS}
            except ValueError as problem:
                raise error("OUTPUTS", str(problem)) from None

        yield predict


@contextlib.contextmanager
def _rest(target: str, model: str, version: int | None, timeout: float, error: MakeError) -> Iterator[Predict]:
    path = f"/v1/models/{quote(model, safe='')}{'' if version is None else f'/versions/{version}'}:predict"
    connection = http.client.HTTPConnection(target, timeout=timeout)

    def post(body):
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read(answers.MOST_BYTES + 1)
        if len(content) > answers.MOST_BYTES:
            connection.close()  # the rest must not be read as the next response
            raise error("OUTPUTS", f"it has more than {answers.MOST_BYTES >> 20} MB. Lower --batch")
        return response.status, content

    def predict(signature, inputs):
        ((name, value),) = inputs.items()
        head = f'{{"signature_name": {json.dumps(signature)}, "inputs": {{{json.dumps(name)}: '
        body = b"".join([head.encode(), *_to_json(value), b"}}"])
        reused = connection.sock is not None
        try:
            try:
                status, content = post(body)
            except (ConnectionError, http.client.BadStatusLine):
                connection.close()
                if not reused:
                    raise
                status, content = post(body)  # servers drop idle connections
        except TimeoutError:
            connection.close()  # a late response must not be read as the next one
            raise error("DEADLINE_EXCEEDED", "") from None
        except (OSError, http.client.BadStatusLine, UnicodeError) as failure:  # UnicodeError: the host name
            connection.close()
            raise error("UNAVAILABLE", str(failure) or type(failure).__name__) from None
        except http.client.HTTPException as failure:  # it began as HTTP
            connection.close()
            raise error("OUTPUTS", str(failure) or type(failure).__name__) from None
        try:
            tree = strict_json.parse(content, strict=False)
            if status == 200:
                return tree["outputs"]
            detail = tree["error"]
        except (strict_json.JsonError, KeyError, TypeError):
            detail = f"HTTP status {status}, {content[:80]!r}"
            if status == 200:
                raise error("OUTPUTS", detail) from None
        raise error(CODES.get(status, f"HTTP status {status}"), str(detail))

    with contextlib.closing(connection):
        yield predict


def _to_json(value: list[bytes] | npt.NDArray) -> Iterator[bytes]:
    """The JSON of an input in pieces: bytes as base64, arrays [.., N, C] as nested lists.

    Python's lists of numbers take ten times the memory of their JSON, so each holds at most PIECE rows.
    """
    if isinstance(value, list):
        yield json.dumps([{"b64": base64.b64encode(item).decode()} for item in value]).encode()
        return
    yield b"["
    step = PIECE if value.ndim == 2 else 1
    for i in range(0, len(value), step):
        if i:
            yield b","
        if value.ndim > 2:
            yield from _to_json(value[i])
        else:
            yield json.dumps(value[i : i + step].tolist(), separators=(",", ":"))[1:-1].encode()
    yield b"]"


def _error(code: str, detail: str, server: str, model: str, version: int | None, timeout: float) -> UserError:
    """The exception for a failed request, from gRPC's name of the code and the server's message."""
    if code == "INVALID_ARGUMENT":
        return Refused(detail)
    what = f"model {model}" + ("" if version is None else f", version {version}")
    told = f" ({detail})" if detail else ""
    return ServerError(
        {
            "UNAVAILABLE": f"No server answers at {server}{told}. Is it running, and is the port right? TF Serving "
            "uses 8500 for gRPC and 8501 for REST",
            "NOT_FOUND": f"The server at {server} has no {what}{told}. Set --model to the name it was started with",
            "DEADLINE_EXCEEDED": f"No response from {server} within {timeout:g} s. The first requests after a start "
            "may be slow; otherwise raise --timeout, or lower --batch",
            "RESOURCE_EXHAUSTED": f"The server at {server} refuses so large a request, or so many{told}. Lower --batch",
            "FAILED_PRECONDITION": f"The {what} at {server} does not take this request{told}. Was it exported by this "
            "package?",
            "OUTPUTS": f"The response of {server} cannot be read{told}",
        }.get(code, f"The server at {server} failed: {code}{told}")
    )
