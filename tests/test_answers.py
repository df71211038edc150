"""Answers that are none: each ends in one sentence, takes little memory, and costs nothing that was answered before."""

import io
import json
import tracemalloc
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image
from scripted_server import D, answer, good, http, serving

from retinanet_keras.errors import ServerError
from retinanet_keras.serving import answers, messages
from retinanet_keras.serving.conversation import connect
from retinanet_keras.storage.printable import printable

pytestmark = pytest.mark.check

ROOT = Path(__file__).parents[1]
REMOVE = object()


def changed(name, value, place=None):
    """`good` with another output, or with another value at a place in one."""
    outputs = good()
    if value is REMOVE:
        del outputs[name]
    elif place is None:
        outputs[name] = value
    else:
        target = json.loads(json.dumps(outputs[name]))
        inner = target
        for index in place[:-1]:
            inner = inner[index]
        inner[place[-1]] = value
        outputs[name] = target
    return outputs


def bad_outputs():
    """{what: outputs} of answers whose JSON is well formed."""
    found = {}
    for name in answers.OUTPUTS:
        whole = good()[name]
        deep = whole
        for _ in range(100):
            deep = [deep]
        others = {
            "missing": REMOVE, "null": None, "a number": 7, "a text": "x", "an object": {"a": 1}, "empty": [],
            "one image": whole[:1], "three images": [*whole, whole[0]], "one more axis": [whole], "100 axes": deep,
            "ragged": [whole[0], [[1, 2, 3]]],
        }  # fmt: skip
        found |= {f"{name} {what}": changed(name, value) for what, value in others.items()}
        place = (1,) if name == "num_detections" else (1, 0, 2) if name == "boxes" else (1, 0)
        items = {"null": None, "true": True, "a list": [1], "an object": {}}
        if name == "names":
            items |= {"a number": 1}
        else:
            items |= {"a text": "1", "400 digits": 10**400, "infinite": float("inf"), "NaN": float("nan")}
            items |= {"-infinite": float("-inf"), "1e308": 1e308}
        if name in ("labels", "num_detections"):
            items |= {"-1": -1, "2^31": 2**31, "half": 0.5}
        if name == "category_ids":
            items |= {"2^63": 2**63, "half": 0.5}
        if name == "scores":
            items |= {"-0.1": -0.1, "1.1": 1.1}
        if name == "num_detections":
            items |= {"more than there are": D + 1}
        found |= {f"{name} with {what}": changed(name, value, place) for what, value in items.items()}
    found["boxes inverted"] = changed("boxes", [30, 2, 1.5, 20], (0, 1))
    found["boxes of three sides"] = changed("boxes", [[[1, 2, 3]] * D] * 2)
    found["rows past the scores"] = {**good(), "scores": [row[:4] for row in good()["scores"]]}
    return found


def bad_bytes():
    """{what: bytes} that a server of REST may send."""
    body = json.dumps({"outputs": good()}).encode()
    return {
        "nothing": b"", "no HTTP": b"\x00\xff" * 50, "no status": b"HTTP/1.1 \r\n\r\n", "SSH": b"SSH-2.0-OpenSSH\r\n",
        "a long line": b"HTTP/1.1 200 " + b"a" * 100_000, "many headers": http(body, headers="a: b\r\n" * 500),
        "cut": http(body)[:-9], "cut text": http(body[:-9]), "chunks that are none": b"HTTP/1.1 200 OK\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "no body": http(b""), "HTML": http(b"<html>"),
        "not UTF-8": http(b'{"outputs": "\xff"}'), "deep": http(b"[" * 200_000), "digits": http(b"1" * 5000),
        "a list": http(b"[]"), "null": http(b"null"), "a text": http(b'"outputs"'), "no outputs": http(b"{}"),
        "a list of outputs": http(b'{"outputs": []}'), "one output": http(b'{"outputs": [[1, 2]]}'),
        "rows": http(b'{"predictions": []}'), "an error that is none": http(b'{"error": 5}', "500 x"),
        "moved": http(b"", "302 Found", "Location: http://elsewhere\r\n"), "text": http(b"no", "502 Bad Gateway"),
        "a long error": http(json.dumps({"error": "\x1b[2J" + "e" * 10**6}).encode(), "500 x"),
        "an error of no text": http(b'{"error": [1]}', "503 x"),
        "half a letter": http(b'{"error": "\\ud800"}', "404 x"),
    }  # fmt: skip


def tensors(**others):
    """The bytes of a PredictResponse like `good`; `others`: {output: messages.Tensor}."""
    response = messages.PredictResponse()
    for name, kind in answers.OUTPUTS.items():
        value = good()[name]
        if kind == "str":
            tensor = messages.Tensor(dtype=messages.STRING, string_val=[text.encode() for row in value for text in row])
            for size in (2, D):
                tensor.tensor_shape.dim.add(size=size)
        else:
            tensor = messages.to_tensor(np.array(value, kind))
        response.outputs.add(key=name, value=others.get(name, tensor))
    return response.SerializeToString()


def tensor(*shape, **fields):
    made = messages.Tensor(**{"dtype": 1, **fields})
    for size in shape:
        made.tensor_shape.dim.add(size=size)
    return made


def bad_messages():
    """{what: bytes} that a server of gRPC may send."""
    scores = {
        "2^31 scores": tensor(2**31, float_val=[0.5]), "2^62 scores": tensor(2**31, 2**31, float_val=[0.5]),
        "2^90 scores": tensor(2**30, 2**30, 2**30, float_val=[0.5]), "-1 scores": tensor(-1, float_val=[0.5]),
        "2^40 times none": tensor(0, 2**40), "500 axes": tensor(*[1] * 500, float_val=[0.5]),
        "no type": tensor(2, D, dtype=0, float_val=[0.5]), "no such type": tensor(2, D, dtype=999, float_val=[0.5]),
        "texts": tensor(2, D, dtype=7, string_val=[b"x"]), "whole": tensor(2, D, dtype=3, int_val=[0]),
        "of 3 bytes": tensor(2, D, tensor_content=b"abc"), "too many": tensor(2, D, float_val=[0.5] * 11),
        "none": tensor(2, D), "not finite": tensor(2, D, float_val=[float("nan")]), "2": tensor(2, D, float_val=[2.0]),
    }  # fmt: skip
    found = {f"scores {what}": tensors(scores=value) for what, value in scores.items()}
    counts = {"-1": [-1], "6": [6], "2 and -7": [2, -7]}
    found |= {f"counts {what}": tensors(num_detections=tensor(2, dtype=3, int_val=v)) for what, v in counts.items()}
    found["scores of counts"] = tensors(scores=tensor(2, float_val=[0.5]))
    found["no message"] = b"\xff" * 40
    found["nothing"] = b""
    found["cut"] = tensors()[:-5]
    return found


@pytest.fixture
def rest():
    with serving() as server:
        yield server


IMAGES = {"image_bytes": [b"first", b"second"]}


def test_a_good_answer_is_read(rest):
    rest.replies[:] = [http(json.dumps({"outputs": good()}).encode())]
    with connect(rest.address, "shapes") as ask:
        found = ask("serving_bytes", IMAGES)
    assert {name: array.tolist() for name, array in found.items()} == good()
    types = {name: "O" if kind == "str" else kind for name, kind in answers.OUTPUTS.items()}
    assert {name: array.dtype for name, array in found.items()} == types


def test_answers_that_are_none_are_told_in_a_sentence(rest):
    """Of REST: more than 104 kinds."""
    replies = {what: http(json.dumps({"outputs": outputs}).encode()) for what, outputs in bad_outputs().items()}
    replies |= bad_bytes()
    assert len(replies) > 104
    for what, reply in replies.items():
        rest.replies[:] = [reply]
        with connect(rest.address, "shapes", timeout=20) as ask, pytest.raises(ServerError) as told:
            ask("serving_bytes", IMAGES)
            pytest.fail(f"accepted: {what}")
        assert len(str(told.value)) < 900 and str(told.value) == printable(told.value), what
        assert rest.address in str(told.value)


@pytest.fixture
def replies():
    """What a server of gRPC at `replies.address` sends: its first item, bytes."""
    replies = types.SimpleNamespace(first=b"")
    handler = grpc.unary_unary_rpc_method_handler(lambda *_: replies.first)
    server = grpc.server(ThreadPoolExecutor(2))
    service = {"Predict": handler}
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("tensorflow.serving.PredictionService", service)]
    )
    replies.address = f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield replies
    server.stop(None).wait()


def test_messages_that_are_none_are_told_in_a_sentence(replies):
    """Of gRPC: shapes of a few bytes that name gigabytes among them."""
    replies.first = tensors()
    with connect(replies.address, "shapes", timeout=20) as ask:
        found = ask("serving_bytes", IMAGES)
        assert found["names"].tolist() == good()["names"] and found["category_ids"][0, 0] == 2**40 + 1
        for what, reply in bad_messages().items():
            replies.first = reply
            with pytest.raises(ServerError) as told:
                ask("serving_bytes", IMAGES)
                pytest.fail(f"accepted: {what}")
            assert len(str(told.value)) < 900 and replies.address in str(told.value), what


def wide(detections, text=b"x"):
    """An answer for two images of so many detections, each output with one value that stands for all."""
    return tensors(
        boxes=tensor(2, detections, 4, float_val=[1]),
        scores=tensor(2, detections, float_val=[1]),
        labels=tensor(2, detections, dtype=3, int_val=[1]),
        category_ids=tensor(2, detections, dtype=9, int64_val=[1]),
        names=tensor(2, detections, dtype=messages.STRING, string_val=[text]),
    )


def test_messages_of_few_bytes_take_little_memory(replies):
    many = messages.PredictResponse()
    for i in range(64):
        many.outputs.add(key=f"k{i}", value=tensor(2**24, dtype=9, int64_val=[1]))
    hungry = {
        "no output boxes, ": many.SerializeToString(),
        "4,000,000 detections an image": wide(4_000_000),
        "names of more than 64 MB": wide(1000, b"x" * 2**20),
        "with 1000000 values": tensors(scores=tensor(2, D, float_val=[0.5] * 10**6)),
    }
    with connect(replies.address, "shapes", timeout=20) as ask:
        for words, reply in hungry.items():
            replies.first = reply
            tracemalloc.start()
            with pytest.raises(ServerError, match=words):
                ask("serving_bytes", IMAGES)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2**20 + 3 * len(reply), (words, peak)
        replies.first = tensors() + many.SerializeToString()  # what is not asked for is not looked at
        tracemalloc.start()
        assert ask("serving_bytes", IMAGES)["scores"].tolist() == good()["scores"]
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_an_answer_that_does_not_end_is_not_read_to_its_end(rest, monkeypatch):
    monkeypatch.setattr(answers, "MOST_BYTES", 2**20)
    rest.replies[:] = [http(b" " * 2**21)]
    with connect(rest.address, "shapes") as ask, pytest.raises(ServerError, match="more than 1 MB. Lower --batch"):
        ask("serving_bytes", IMAGES)


@pytest.mark.parametrize("chunks", [b"zz\r\n", b"5\r\nabc", b""])
def test_an_answer_that_breaks_off_is_not_told_as_none(rest, chunks):
    rest.replies[:] = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks]
    with (
        connect(rest.address, "shapes") as ask,
        pytest.raises(ServerError, match=r"^The response of .* cannot be read"),
    ):
        ask("serving_bytes", IMAGES)


def encoded(kind, size, **options):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_boxes_are_within_the_images_that_were_sent_as_bytes(rest, kind):
    """Those of `good` go to 30, 20.25."""
    rest.replies[:] = [http(json.dumps({"outputs": good()}).encode())]
    large, narrow = encoded(kind, (40, 30)), encoded(kind, (28, 30))
    with connect(rest.address, "shapes") as ask:
        for sent in ([large, large], [large, b"no image"]):
            assert ask("serving_bytes", {"image_bytes": sent})["num_detections"].tolist() == [3, 3]
        with pytest.raises(ServerError, match="boxes outside of the image, which has 28x30 pixels"):
            ask("serving_bytes", {"image_bytes": [large, narrow]})
        rest.replies[:] = [http(json.dumps({"outputs": changed("boxes", [0, 0, 1e38, 1e38], (1, 2))}).encode())]
        with pytest.raises(ServerError, match="boxes outside of the image, which has 40x30 pixels"):
            ask("serving_bytes", {"image_bytes": [large, large]})


def test_boxes_in_a_gif_of_several_frames_may_be_anywhere(rest):
    """Their sides are those that count, and not the screen's."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    rest.replies[:] = [answer()]
    with connect(rest.address, "shapes") as ask:
        ask("serving_bytes", {"image_bytes": [encoded("GIF", (8, 8), save_all=True, append_images=frames)]})


def test_boxes_are_within_the_pixels_that_were_sent():
    found = answers.checked(good(), 2, (20, 30))  # to 20.25, a rounding error
    assert found["boxes"].shape == (2, D, 4)
    for size in ((19, 30), (20, 28)):
        with pytest.raises(answers.BadAnswer, match="boxes outside of the image"):
            answers.checked(good(), 2, size)
    assert answers.checked(changed("boxes", [-9, -9, 999, 999], (0, 4)), 2, (20, 30))  # a row that does not count


def test_random_changes_are_read_rightly_or_told():
    """Every value of an answer replaced by each of some others, in turn."""
    values = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, float("nan"), 1e39, "", "1", [], [1], {}]
    for name in answers.OUTPUTS:
        rows = [()] if name == "num_detections" else [(j,) for j in range(D)]
        places = [(i, *row) for i in range(2) for row in rows]
        for place in places:
            for value in values:
                try:
                    found = answers.checked(changed(name, value, place), 2)
                except answers.BadAnswer as told:
                    assert len(str(told)) < 300
                    continue
                used = np.arange(D) < found["num_detections"][:, None]
                assert np.isfinite(found["boxes"][used]).all() and (found["labels"][used] >= 0).all()
                assert found["scores"].shape == (2, D) and all(type(text) is str for text in found["names"].ravel())
