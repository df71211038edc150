"""One Predict request after the other to a TF Serving server, over gRPC or REST.

REST bodies follow TF Serving's "RESTful API" page: columnar `inputs`, binary values as {"b64": ...}, errors in `error`.
"""

import base64
import contextlib
import http.client
import json
import re
from urllib.parse import quote

from retinanet_keras.errors import ServerError, UserError
from retinanet_keras.serving import answers, pictures
from retinanet_keras.storage import strict_json
from retinanet_keras.storage.printable import printable

METHOD = "/tensorflow.serving.PredictionService/Predict"
# The gRPC code behind an HTTP status, where TF Serving's REST interface has one for it.
CODES = {
    400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 408: "DEADLINE_EXCEEDED", 413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip
SHOWN = 300  # characters of a server's words
PIECE = 4096  # pixels of a row that are made JSON at once


class Refused(UserError):
    """The server refuses the input (INVALID_ARGUMENT): bytes that are no image, or another model's input."""


@contextlib.contextmanager
def connect(server, model, *, version=None, timeout=60.0):
    """A function that asks a server, for as long as the context lasts; not for several threads at once.

    Args:
        server: grpc://host:port or http://host:port.
        model: its name on the server.
        version: a number, or None for the server's choice.
        timeout: seconds for one request; over REST, for each wait in it.

    Yields:
        a function from (signature, {input: list of bytes, or array}) to the dict of `export.signatures`, as NumPy
        arrays; names are str. Boxes are within their images, as far as the headers of those that are bytes tell.

    Raises:
        UserError: where `server` is no address. The function raises Refused and ServerError.
    """
    protocol, target = _address(server)
    _check_name(model, version)

    def error(code, detail):
        detail = " ".join(detail.split("[[{{")[0].split())  # without the names of graph nodes that TensorFlow adds
        detail = printable(detail[:SHOWN]) + ("..." if len(detail) > SHOWN else "")
        return _error(code, detail, server, model, version, timeout)

    with protocol(target, model, version, timeout, error) as ask:

        def checked(signature, inputs):
            (sent,) = inputs.values()
            sizes = [pictures.size_of(item) for item in sent] if isinstance(sent, list) else sent.shape[1:3]
            try:
                return answers.checked(ask(signature, inputs), len(sent), sizes)
            except answers.BadAnswer as problem:
                raise ServerError(
                    f"The answer of {server} is not one of a RetinaNet exported by this package: {problem}. Is it the "
                    "right model, and is it served alone at this port?"
                ) from None

        yield checked


def _address(server):
    """(_grpc or _rest, "host:port"). What is no address is not shown: a password or a key may be anywhere in it."""
    match = re.fullmatch(r"(grpc|http)://((?:[\w.-]+|\[[\w:.%]+\]):([0-9]{1,5}))/?", server, re.IGNORECASE)
    if not match or not 0 < int(match[3]) < 2**16:
        scheme = re.match("(grpcs?|https?)://", server, re.IGNORECASE)
        got = f"{scheme[0]}..." if scheme else "something else"
        raise UserError(
            f"--server: expected grpc://HOST:8500 or http://HOST:8501, got {got} (not shown: it may hold a password). "
            "Give a host and a port alone, passwords and paths cannot be sent"
        )
    return (_grpc if match[1].lower() == "grpc" else _rest), match[2]


def _check_name(model, version):
    try:
        model.encode()
    except UnicodeEncodeError:
        raise UserError(f"--model: expected a name in UTF-8, got {model!r}. Name it as the server does") from None
    if version is not None and not 0 <= version < 2**63:
        raise UserError(f"--version: expected 0 to {2**63 - 1}, got another number. Leave it out for the newest")


@contextlib.contextmanager
def _grpc(target, model, version, timeout, error):
    import grpc  # a tenth of a second that REST does without

    from retinanet_keras.serving import messages

    # gRPC's limit is 4 MB unless told otherwise; TF Serving lifts its own.
    limits = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", answers.MOST_BYTES)]
    with grpc.insecure_channel(target, options=limits) as channel:
        predict = channel.unary_unary(
            METHOD, messages.PredictRequest.SerializeToString, messages.PredictResponse.FromString
        )

        def ask(signature, inputs):
            try:
                response = predict(messages.request(model, version, signature, inputs), timeout=timeout)
            except grpc.RpcError as failure:
                raise error(failure.code().name, failure.details() or "") from None
            tensors = {output.key: output.value for output in response.outputs}
            shapes = {name: tuple(d.size for d in tensor.tensor_shape.dim[:9]) for name, tensor in tensors.items()}
            (sent,) = inputs.values()
            answers.check_shapes(shapes, len(sent))  # first: a few bytes can stand for values of any shape
            try:
                return {name: messages.to_array(tensors[name], answers.MOST_VALUES) for name in answers.OUTPUTS}
            except ValueError as problem:
                raise error("OUTPUTS", str(problem)) from None

        yield ask


@contextlib.contextmanager
def _rest(target, model, version, timeout, error):
    path = f"/v1/models/{quote(model, safe='')}{'' if version is None else f'/versions/{version}'}:predict"
    connection = http.client.HTTPConnection(target, timeout=timeout)

    def post(body):
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read(answers.MOST_BYTES + 1)
        if len(answer) > answers.MOST_BYTES:
            connection.close()  # the rest is not the next request's answer
            raise error("OUTPUTS", f"it has more than {answers.MOST_BYTES >> 20} MB. Lower --batch")
        return response.status, answer

    def ask(signature, inputs):
        ((name, value),) = inputs.items()
        head = f'{{"signature_name": {json.dumps(signature)}, "inputs": {{{json.dumps(name)}: '
        body = b"".join([head.encode(), *_to_json(value), b"}}"])
        kept = connection.sock is not None
        try:
            try:
                status, answer = post(body)
            except (ConnectionError, http.client.BadStatusLine):
                connection.close()
                if not kept:
                    raise
                status, answer = post(body)  # servers drop connections that were idle
        except TimeoutError:
            connection.close()  # the answer may still come, and is not the next request's
            raise error("DEADLINE_EXCEEDED", "") from None
        except (OSError, http.client.BadStatusLine, UnicodeError) as failure:  # the last is of a host's name
            connection.close()
            raise error("UNAVAILABLE", str(failure) or type(failure).__name__) from None
        except http.client.HTTPException as failure:  # the answer begins as HTTP does
            connection.close()
            raise error("OUTPUTS", str(failure) or type(failure).__name__) from None
        try:
            tree = strict_json.parse(answer, strict=False)
            if status == 200:
                return tree["outputs"]
            detail = tree["error"]
        except (strict_json.JsonError, KeyError, TypeError):
            detail = f"HTTP status {status}, {answer[:80]!r}"
            if status == 200:
                raise error("OUTPUTS", detail) from None
        raise error(CODES.get(status, f"HTTP status {status}"), str(detail))

    with contextlib.closing(connection):
        yield ask


def _to_json(value):
    """The JSON of an input in pieces: strings are bytes here, so all go as base64; arrays [.., N, C] are nested lists.

    Python's lists of numbers take ten times the memory of their JSON, so there is one at a time, of PIECE rows.
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


def _error(code, detail, server, model, version, timeout):
    """What to tell of a failed request. Args: gRPC's name of the code, the server's words, what was asked."""
    if code == "INVALID_ARGUMENT":
        return Refused(detail)
    what = f"model {model}" + ("" if version is None else f", version {version}")
    told = f" ({detail})" if detail else ""
    return ServerError(
        {
            "UNAVAILABLE": f"No server answers at {server}{told}. Is it running, and is this its port? TF Serving's is "
            "8500 for gRPC and 8501 for REST",
            "NOT_FOUND": f"The server at {server} has no {what}{told}. --model is the name it was started with",
            "DEADLINE_EXCEEDED": f"No answer from {server} within {timeout:g} s. The first requests after a start may "
            "be slow; else raise --timeout, or lower --batch",
            "RESOURCE_EXHAUSTED": f"The server at {server} refuses so large a request, or so many{told}. Lower --batch",
            "FAILED_PRECONDITION": f"The {what} at {server} cannot be asked this{told}. Was it exported here?",
            "OUTPUTS": f"The answer of {server} cannot be read{told}",
        }.get(code, f"The server at {server} failed: {code}{told}")
    )
