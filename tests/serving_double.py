"""A test double of TF Serving's model server: no server to run in production, and none of TF Serving's code.

It loads a SavedModel as TF Serving does (`tf.compat.v1.saved_model.loader`, a session, the tag "serve"), speaks gRPC
with the messages and the PredictionService of `tensorflow-serving-api`, and REST by the rules of the page "RESTful API"
of TF Serving's documentation, which the functions below quote. Batching, warm-up, metrics and roll-over are not in it.

    python tests/serving_double.py BASE_PATH NAME    # prints the two ports and serves until its input ends
"""

import base64
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

GRPC_CODES = {code.value[0]: code for code in grpc.StatusCode}
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400, grpc.StatusCode.FAILED_PRECONDITION: 400, grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429, grpc.StatusCode.UNIMPLEMENTED: 501,
}  # fmt: skip
# TensorProto's field for each type; TF Serving answers with these rather than with `tensor_content`.
VALUES = {
    tf.float32: "float_val", tf.int32: "int_val", tf.uint8: "int_val", tf.int64: "int64_val", tf.string: "string_val",
}  # fmt: skip


class Failure(Exception):
    """Args: a grpc.StatusCode; the message."""


def bad(message):
    return Failure(grpc.StatusCode.INVALID_ARGUMENT, message)


class Servable:
    """The newest version under a base path, which is what TF Serving serves by default."""

    def __init__(self, base_path, name):
        self.name = name
        self.version = max(int(path.name) for path in Path(base_path).iterdir() if path.name.isdigit())
        graph = tf.Graph()
        self.session = tf.compat.v1.Session(graph=graph)
        with graph.as_default():
            meta = tf.compat.v1.saved_model.loader.load(
                self.session, ["serve"], str(Path(base_path, str(self.version)))
            )
        self.signatures = {
            name: signature
            for name, signature in meta.signature_def.items()
            if signature.method_name == "tensorflow/serving/predict"
        }

    def signature(self, model, version, signature):
        """(name, SignatureDef); `version` None is the newest, `signature` "" the default."""
        if model != self.name or version not in (None, self.version):
            asked = f"Latest({model})" if version is None else f"Specific({model}, {version})"
            raise Failure(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {asked}")
        signature = signature or "serving_default"
        if signature not in self.signatures:
            message = f'Serving signature key "{signature}" not found.'
            raise Failure(grpc.StatusCode.FAILED_PRECONDITION, message)
        return signature, self.signatures[signature]

    def predict(self, signature, inputs, output_filter=()):
        """{output: array} of {input: array}."""
        if set(inputs) != set(signature.inputs):
            raise bad(f"input tensor aliases {sorted(inputs)}, expected {sorted(signature.inputs)}")
        for name, array in inputs.items():
            expected = tf.dtypes.as_dtype(signature.inputs[name].dtype)
            given = tf.string if array.dtype == object else tf.dtypes.as_dtype(array.dtype)
            if given != expected:
                raise bad(f"{name} expects {expected.name} but {given.name} is provided")
        wanted = output_filter or list(signature.outputs)
        if unknown := set(wanted) - set(signature.outputs):
            raise bad(f"output tensor alias not found in signature: {sorted(unknown)}")
        feed = {signature.inputs[name].name: array for name, array in inputs.items()}
        try:
            return self.session.run({name: signature.outputs[name].name for name in wanted}, feed)
        except ValueError as error:  # the Python session's check of the rank, which is C++'s INVALID_ARGUMENT
            raise bad(str(error)) from None
        except tf.errors.OpError as error:
            raise Failure(GRPC_CODES[error.error_code], error.message) from None


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, servable):
        self.servable = servable

    def Predict(self, request, context):
        spec = request.model_spec
        version = spec.version.value if spec.HasField("version") else None
        try:
            name, signature = self.servable.signature(spec.name, version, spec.signature_name)
            try:
                inputs = {key: tf.make_ndarray(tensor) for key, tensor in request.inputs.items()}
            except (ValueError, TypeError) as error:
                raise bad(f"tensor parsing error: {error}") from None
            outputs = self.servable.predict(signature, inputs, request.output_filter)
        except Failure as failure:
            context.abort(*failure.args)
        response = predict_pb2.PredictResponse()
        response.model_spec.name, response.model_spec.signature_name = self.servable.name, name
        response.model_spec.version.value = self.servable.version
        for key, array in outputs.items():
            tensor, dtype = response.outputs[key], tf.dtypes.as_dtype(signature.outputs[key].dtype)
            tensor.dtype = dtype.as_datatype_enum
            tensor.tensor_shape.CopyFrom(tf.TensorShape(array.shape).as_proto())
            getattr(tensor, VALUES[dtype]).extend(array.ravel().tolist())
        return response


def tensor_of_json(value, dtype):
    """An array of a JSON value: tensors "in their natural nested notation"."""
    shape, first = [], value
    while isinstance(first, list):
        shape.append(len(first))
        first = first[0] if first else None
    flat = []

    def fill(value, level):
        if isinstance(value, list):
            if level >= len(shape) or len(value) != shape[level]:
                raise bad(f"Encountered list at unexpected level or size: {len(value)} at level {level}")
            for item in value:
                fill(item, level + 1)
        elif level != len(shape):
            raise bad(f"JSON Value found at incorrect level: {level + 1}")
        else:
            flat.append(value_of_json(value, dtype))

    fill(value, 0)
    return np.array([*flat, None], object)[:-1].astype(dtype.as_numpy_dtype).reshape(shape)


def value_of_json(value, dtype):
    """A number is a JSON number, whole for whole types; "binary values must be base64 encoded" in {"b64": ...}."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if dtype == tf.string:
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str):
            try:
                return base64.b64decode(value["b64"], validate=True)
            except ValueError:
                raise bad("Unable to base64 decode") from None
    elif number and (dtype.is_floating or isinstance(value, int)):
        if dtype.is_integer and not dtype.min <= value <= dtype.max:
            raise bad(f"JSON Value: {value} is out of the range of {dtype.name}")
        return value
    raise bad(
        f"JSON Value: {json.dumps(value)[:40]} Type: {type(value).__name__} is not of expected type: {dtype.name}"
    )


def inputs_of_json(tree, signature):
    """({input: array}, whether in row format): "instances" by rows or "inputs" by columns, "but NOT both"."""
    if not isinstance(tree, dict) or ("instances" in tree) == ("inputs" in tree):
        raise bad("Request must be an object with either 'instances' or 'inputs'")
    types = {name: tf.dtypes.as_dtype(info.dtype) for name, info in signature.inputs.items()}
    only = next(iter(types)) if len(types) == 1 else None
    row = "instances" in tree
    if row:
        items = tree["instances"]
        if not isinstance(items, list) or not items:
            raise bad("'instances' must be a list of at least one value")
        if all(isinstance(item, dict) and set(item) == set(types) for item in items):
            columns = {name: [item[name] for item in items] for name in types}
        elif only:  # "when there is only one named input, specify the value to be the value of the input"
            columns = {only: items}
        else:
            raise bad(f"each of 'instances' must be an object of {sorted(types)}")
    else:
        columns = tree["inputs"]
        if not isinstance(columns, dict) or list(columns) == ["b64"]:
            if not only:
                raise bad("'inputs' must be an object: there is more than one input")
            columns = {only: columns}
    if set(columns) != set(types):
        raise bad(f"JSON object: has the inputs {sorted(columns)}, expected {sorted(types)}")
    return {name: tensor_of_json(value, types[name]) for name, value in columns.items()}, row


def json_of_outputs(outputs, row):
    """The response: a single output goes without its name; strings are text unless the name ends with "_bytes"."""
    columns = {name: json_of_tensor(name, array) for name, array in outputs.items()}
    only = len(columns) == 1
    if not row:
        return {"outputs": next(iter(columns.values())) if only else columns}
    if only:
        return {"predictions": next(iter(columns.values()))}
    return {"predictions": [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]}


def json_of_tensor(name, array):
    def value(item):
        if isinstance(item, bytes):
            return {"b64": base64.b64encode(item).decode()} if name.endswith("_bytes") else item.decode()
        return float(str(item)) if isinstance(item, np.floating) else item.item()  # the shortest that reads back

    return value(array) if np.ndim(array) == 0 else [json_of_tensor(name, part) for part in array]


class Rest(BaseHTTPRequestHandler):
    """`/v1/models/NAME[/versions/N]`, with `:predict` or `/metadata`; errors are {"error": message}."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the headers' acknowledgement
    servable = None
    ROUTE = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d+))?(:predict|/metadata)?")

    def do_GET(self):
        self.answer("GET")

    def do_POST(self):
        self.answer("POST")

    def answer(self, method):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            tree, status = self.reply(method, body), 200
        except Failure as failure:
            code, message = failure.args
            tree, status = {"error": message}, HTTP_STATUS.get(code, 500)
        content = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def reply(self, method, body):
        match = self.ROUTE.fullmatch(self.path)
        if not match or (match[3] == ":predict") != (method == "POST"):
            raise bad(f"Malformed request: {method} {self.path}")
        model, version, verb = match[1], match[2] and int(match[2]), match[3]
        if verb != ":predict":
            self.servable.signature(model, version, "")
            return self.metadata() if verb else self.status()
        try:
            tree = json.loads(body)
        except ValueError as error:
            raise bad(f"JSON Parse error: {error}") from None
        asked = tree.get("signature_name", "") if isinstance(tree, dict) else ""
        if not isinstance(asked, str):
            raise bad("'signature_name' key must be a string value.")
        _, signature = self.servable.signature(model, version, asked)
        inputs, row = inputs_of_json(tree, signature)
        return json_of_outputs(self.servable.predict(signature, inputs), row)

    def status(self):
        """GetModelStatusResponse as JSON."""
        good = {"error_code": "OK", "error_message": ""}
        return {"model_version_status": [{"version": str(self.servable.version), "state": "AVAILABLE", "status": good}]}

    def metadata(self):
        """GetModelMetadataResponse as JSON."""
        named = {
            name: json_format.MessageToDict(signature, preserving_proto_field_name=True)
            for name, signature in self.servable.signatures.items()
        }
        spec = {"name": self.servable.name, "signature_name": "", "version": str(self.servable.version)}
        return {"model_spec": spec, "metadata": {"signature_def": {"signature_def": named}}}

    def log_message(self, *_):
        pass


class Double:
    """Both servers on free ports of this machine, as a context. `grpc` and `rest` are their addresses.

    Args:
        base_path, name: of the model.
        max_message: bytes that the gRPC server takes; TF Serving takes 2 GB, gRPC by default 4 MB (None).
    """

    def __init__(self, base_path, name="shapes", max_message=2**31 - 1):
        self.servable = Servable(base_path, name)
        options = [] if max_message is None else [("grpc.max_receive_message_length", max_message)]
        self.grpc_server = grpc.server(ThreadPoolExecutor(8), options=options)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
            PredictionService(self.servable), self.grpc_server
        )
        self.grpc = f"grpc://127.0.0.1:{self.grpc_server.add_insecure_port('127.0.0.1:0')}"
        self.rest_server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("RestOfOne", (Rest,), {"servable": self.servable})
        )
        self.rest_server.daemon_threads = True
        self.rest = f"http://127.0.0.1:{self.rest_server.server_port}"

    def __enter__(self):
        self.grpc_server.start()
        threading.Thread(target=self.rest_server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.grpc_server.stop(None).wait()
        self.rest_server.shutdown()
        self.rest_server.server_close()
        self.servable.session.close()


if __name__ == "__main__":
    with Double(*sys.argv[1:3]) as double:
        print(json.dumps({"grpc": double.grpc, "rest": double.rest}), flush=True)
        sys.stdin.read()
