"""TF Serving's Predict messages and the tensors in them, without TensorFlow, whose import takes seconds.

Names, numbers and types are those of `tensorflow_serving/apis/{predict,model}.proto` and
`tensorflow/core/framework/{tensor,tensor_shape,types}.proto` (Apache-2.0). Only the fields used here are declared,
which protobuf allows: a reader skips unknown fields. Two types are declared differently, with the same bytes: the enum
DataType as a number, and a map as a list of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# message: {field: (number, type)}; the type is in a list for a repeated field
MESSAGES: dict[str, dict[str, tuple[int, Any]]] = {
    "Dim": {"size": (1, "int64")},
    "Shape": {"dim": (2, ["Dim"])},
    "Tensor": {
        "dtype": (1, "int32"),
        "tensor_shape": (2, "Shape"),
        "tensor_content": (4, "bytes"),
        "float_val": (5, ["float"]),
        "int_val": (7, ["int32"]),
        "string_val": (8, ["bytes"]),
        "int64_val": (10, ["int64"]),
    },
    "Version": {"value": (1, "int64")},
    "ModelSpec": {"name": (1, "string"), "version": (2, "Version"), "signature_name": (3, "string")},
    "Named": {"key": (1, "string"), "value": (2, "Tensor")},
    "PredictRequest": {"model_spec": (1, "ModelSpec"), "inputs": (2, ["Named"])},
    "PredictResponse": {"outputs": (1, ["Named"]), "model_spec": (2, "ModelSpec")},
}
STRING = 7  # DataType DT_STRING
# DataType: (NumPy's type, the field that holds its values if `tensor_content` is empty)
NUMBERS = {1: ("float32", "float_val"), 3: ("int32", "int_val"), 4: ("uint8", "int_val"), 9: ("int64", "int64_val")}


def _declare() -> dict[str, Any]:
    """The message classes of MESSAGES, in a separate pool, as TensorFlow declares its own if it is imported later."""
    file = descriptor_pb2.FileDescriptorProto(name="predict.proto", package="predict", syntax="proto3")
    for message, fields in MESSAGES.items():
        declared = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            repeated = isinstance(kind, list)
            kind = kind[0] if repeated else kind
            field = declared.field.add(name=name, number=number, label=3 if repeated else 1)  # repeated, optional
            if kind in MESSAGES:
                field.type, field.type_name = field.TYPE_MESSAGE, f".predict.{kind}"
            else:
                field.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"predict.{name}"))
        for name in ("Tensor", "PredictRequest", "PredictResponse")
    }


_CLASSES = _declare()
Tensor, PredictRequest, PredictResponse = _CLASSES["Tensor"], _CLASSES["PredictRequest"], _CLASSES["PredictResponse"]


def request(model: str, version: int | None, signature: str, inputs: Mapping[str, list[bytes] | npt.NDArray]) -> Any:
    """A PredictRequest.

    Args:
        model: str. Name of the model on the server.
        version: int. None for the server's choice.
        signature: str. Name of the signature.
        inputs: {name: list of bytes, or an array}.
    """
    message = PredictRequest()
    message.model_spec.name = model
    message.model_spec.signature_name = signature
    if version is not None:
        message.model_spec.version.value = version
    for name, value in inputs.items():
        message.inputs.add(key=name, value=to_tensor(value))
    return message


def to_tensor(value: list[bytes] | npt.NDArray) -> Any:
    """The Tensor of a list of bytes [B], or of an array of a type in NUMBERS; `to_array` is the inverse."""
    if isinstance(value, list):
        tensor = Tensor(dtype=STRING, string_val=value)
        tensor.tensor_shape.dim.add(size=len(value))
        return tensor
    value = np.ascontiguousarray(value)
    dtype = next(number for number, (kind, _) in NUMBERS.items() if kind == value.dtype)
    tensor = Tensor(dtype=dtype, tensor_content=value.astype(value.dtype.newbyteorder("<")).tobytes())
    for size in value.shape:
        tensor.tensor_shape.dim.add(size=size)
    return tensor


def to_array(tensor: Any, most: int = 2**31) -> npt.NDArray:
    """The array of a Tensor, strings as an object array of bytes; missing values repeat the last one.

    Args:
        tensor: Tensor.
        most: int. The largest number of values that is accepted.

    Raises:
        ValueError: if it has another type, more than `most` values, or a number of values that does not fit its shape.
    """
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    size = math.prod(shape)
    if any(not 0 <= side <= most for side in shape) or size > most:  # a few bytes can claim any shape
        raise ValueError(f"a tensor of shape {shape[:10]}")
    if tensor.dtype == STRING:
        values = tensor.string_val
    elif tensor.dtype not in NUMBERS:
        raise ValueError(f"a tensor of TensorFlow's type number {tensor.dtype}, expected one of {[*NUMBERS, STRING]}")
    else:
        kind, field = NUMBERS[tensor.dtype]
        values = getattr(tensor, field)
        if tensor.tensor_content:
            values = np.frombuffer(tensor.tensor_content, np.dtype(kind).newbyteorder("<"))
    if len(values) > size or (size and not len(values)):
        raise ValueError(f"a tensor of shape {shape[:10]} with {len(values)} values")
    if tensor.dtype == STRING:
        values = np.array([*values, None], object)[:-1]  # the None prevents a fixed-width type
    else:
        values = np.array(values, kind)
    return np.pad(values, (0, size - len(values)), "edge").reshape(shape)
