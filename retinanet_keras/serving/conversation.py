"""One Predict request after the other to a TF Serving server, over gRPC or REST.

REST bodies follow TF Serving's "RESTful API" page: columnar `inputs`, binary values as {"b64": ...}, errors in `error`.
"""

import base64
import contextlib
import http.client
import json
from urllib.parse import quote, urlsplit

import numpy as np

from retinanet_keras.errors import UserError

METHOD = "/tensorflow.serving.PredictionService/Predict"
# The gRPC code behind an HTTP status, where TF Serving's REST interface has one for it.
CODES = {
    400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 408: "DEADLINE_EXCEEDED", 413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip
OUTPUTS = {
    "boxes": "float32", "scores": "float32", "labels": "int32", "category_ids": "int64", "names": "str",
    "num_detections": "int32",
}  # fmt: skip


class ServerError(UserError):
    """The server is not there, has not the model, or does not answer in time: no other image would fare better."""


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
        arrays; names are str.

    Raises:
        UserError: where `server` is no address. The function raises Refused and ServerError.
    """
    address = urlsplit(server)
    try:
        port = address.port
    except ValueError:
        port = None
    if address.scheme not in ("grpc", "http") or not address.hostname or not port or address.path.strip("/"):
        raise UserError(f"--server: expected grpc://HOST:8500 or http://HOST:8501, got {server}")

    def error(code, detail):
        detail = " ".join(detail.split("[[{{")[0].split())  # without the names of graph nodes that TensorFlow adds
        return _error(code, detail, server, model, version, timeout)

    protocol = _grpc if address.scheme == "grpc" else _rest
    with protocol(f"{address.netloc}", model, version, timeout, error) as ask:
        yield lambda signature, inputs: _checked(ask(signature, inputs), server)


@contextlib.contextmanager
def _grpc(target, model, version, timeout, error):
    import grpc  # a tenth of a second that REST does without

    from retinanet_keras.serving import messages

    # gRPC's limit is 4 MB unless told otherwise; TF Serving lifts its own.
    unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(target, options=unlimited) as channel:
        predict = channel.unary_unary(
            METHOD, messages.PredictRequest.SerializeToString, messages.PredictResponse.FromString
        )

        def ask(signature, inputs):
            try:
                response = predict(messages.request(model, version, signature, inputs), timeout=timeout)
            except grpc.RpcError as failure:
                raise error(failure.code().name, failure.details() or "") from None
            try:
                return {named.key: messages.to_array(named.value) for named in response.outputs}
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
        return response.status, response.read()

    def ask(signature, inputs):
        body = json.dumps({"signature_name": signature, "inputs": {k: _to_json(v) for k, v in inputs.items()}})
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
        except (OSError, http.client.HTTPException) as failure:
            connection.close()
            raise error("UNAVAILABLE", str(failure) or type(failure).__name__) from None
        try:
            tree = json.loads(answer)
            if status == 200:
                return {name: np.array(value) for name, value in tree["outputs"].items()}
            detail = tree["error"]
        except (ValueError, KeyError, TypeError, AttributeError):
            detail = f"HTTP status {status}, {answer[:80]!r}"
            if status == 200:
                raise error("OUTPUTS", detail) from None
        raise error(CODES.get(status, f"HTTP status {status}"), str(detail))

    with contextlib.closing(connection):
        yield ask


def _to_json(value):
    """Strings are bytes here, so all go as base64; arrays are nested lists."""
    if isinstance(value, list):
        return [{"b64": base64.b64encode(item).decode()} for item in value]
    return value.tolist()


def _checked(outputs, server):
    """The outputs of a RetinaNet exported here, in their types."""
    if missing := sorted(set(OUTPUTS) - set(outputs)):
        raise ServerError(
            f"The model at {server} has no output {', '.join(missing)}, but {', '.join(sorted(outputs))}: it was not "
            "exported by this package"
        )
    found = {name: outputs[name].astype(kind) for name, kind in OUTPUTS.items() if name != "names"}
    names = outputs["names"]
    decoded = [name.decode(errors="replace") if isinstance(name, bytes) else name for name in names.ravel()]
    return {**found, "names": np.array(decoded, object).reshape(names.shape)}


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
