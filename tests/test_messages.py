"""The messages declared here against those of `tensorflow-serving-api` and TensorFlow."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2

from retinanet_keras.serving import messages


def differences(name, official):
    """Fields of a message declared here, and of those in it, that are not TF Serving's. `official`: its descriptor."""
    for field, (number, kind) in messages.MESSAGES[name].items():
        theirs = official.fields_by_name.get(field)
        if theirs is None or theirs.number != number or theirs.is_repeated != isinstance(kind, list):
            yield official.full_name, field
            continue
        kind = kind[0] if isinstance(kind, list) else kind
        if kind in messages.MESSAGES:
            yield from differences(kind, theirs.message_type)
        elif theirs.type == theirs.TYPE_ENUM:  # a number on the wire
            if kind != "int32" or theirs.enum_type.full_name != "tensorflow.DataType":
                yield official.full_name, field
        elif theirs.type != getattr(theirs, f"TYPE_{kind.upper()}"):
            yield official.full_name, field


def test_declared_fields_are_tf_servings(monkeypatch):
    roots = {"PredictRequest": predict_pb2.PredictRequest, "PredictResponse": predict_pb2.PredictResponse}
    for name, theirs in roots.items():
        assert not list(differences(name, theirs.DESCRIPTOR))
    monkeypatch.setitem(messages.MESSAGES, "Dim", {"size": (2, "int64")})  # the check itself
    assert list(differences("PredictRequest", predict_pb2.PredictRequest.DESCRIPTOR)) == [
        ("tensorflow.TensorShapeProto.Dim", "size")
    ]


def test_types_are_tensorflows():
    for number, (kind, _) in messages.NUMBERS.items():
        assert tf.dtypes.as_dtype(number).name == kind
    assert tf.string.as_datatype_enum == messages.STRING


def test_tf_servings_classes_read_the_request():
    pixels = np.arange(24, dtype="uint8").reshape(1, 2, 4, 3)
    sent = messages.request("shapes", 3, "serving_default", {"images": pixels, "names": [b"\xff\x00", b""]})
    read = predict_pb2.PredictRequest.FromString(sent.SerializeToString())
    assert (read.model_spec.name, read.model_spec.version.value) == ("shapes", 3)
    assert read.model_spec.signature_name == "serving_default"
    np.testing.assert_array_equal(tf.make_ndarray(read.inputs["images"]), pixels)
    assert tf.make_ndarray(read.inputs["names"]).tolist() == [b"\xff\x00", b""]
    unversioned = messages.request("shapes", None, "x", {}).SerializeToString()
    assert not predict_pb2.PredictRequest.FromString(unversioned).model_spec.HasField("version")


@pytest.mark.parametrize("kind", [name for name, _ in messages.NUMBERS.values()])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 4)])
def test_tensors_of_either_form_are_read(kind, shape):
    array = np.arange(np.prod(shape), dtype=kind).reshape(shape)
    packed = tf.make_tensor_proto(array)  # as bytes, unless it is of one value
    spelled = tf.make_tensor_proto(array)
    spelled.ClearField("tensor_content")
    field = messages.NUMBERS[spelled.dtype][1]
    getattr(spelled, field)[:] = array.ravel().tolist()
    for theirs in (packed, spelled):
        read = messages.to_array(messages.Tensor.FromString(theirs.SerializeToString()))
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)
    ours = messages.to_tensor(array).SerializeToString()
    np.testing.assert_array_equal(tf.make_ndarray(type(packed).FromString(ours)), array)


def test_omitted_values_repeat_the_last_and_faulty_tensors_are_refused():
    short = tf.make_tensor_proto(7, tf.int32, (2, 3))
    assert messages.to_array(messages.Tensor.FromString(short.SerializeToString())).tolist() == [[7] * 3] * 2
    strings = tf.make_tensor_proto([[b"a", b"b\x00"]])
    assert messages.to_array(messages.Tensor.FromString(strings.SerializeToString())).tolist() == [[b"a", b"b\x00"]]
    faulty = messages.Tensor(dtype=1, float_val=[1.0, 2.0])
    with pytest.raises(ValueError, match="2 values"):
        messages.to_array(faulty)
    with pytest.raises(ValueError, match="type number 2"):
        messages.to_array(messages.Tensor(dtype=2))
