"""The client against a double of TF Serving that speaks its messages and its documented JSON; see `serving_double`."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from PIL import Image
from serving_double import Double
from tensorflow_serving.config import model_server_config_pb2

from retinanet_keras.errors import DataError, ServerError, UserError
from retinanet_keras.serving import answers, client, detector, export
from retinanet_keras.serving.conversation import Refused, connect

ROOT = Path(__file__).parents[1]
SIZES = [(48, 64), (64, 48), (48, 64), (33, 90)]  # height, width


@pytest.fixture(scope="module")
def double(tiny_export):
    with Double(tiny_export) as double:
        yield double


@pytest.fixture(params=["grpc", "rest"])
def server(request, double):
    return getattr(double, request.param)


def picture(size, seed=0):
    rng = np.random.default_rng([seed, *size])
    return np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), "uint8")).resize(size[::-1], Image.BICUBIC))


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def expected(tiny_export):
    """What the SavedModel finds in the pictures of SIZES, asked through TensorFlow's own loader."""
    detect, _ = detector.of_export(export.find(tiny_export))
    return [{name: value[0] for name, value in detect(picture(size)[None]).items()} for size in SIZES]


def assert_same(found, expected):
    assert expected["num_detections"] > 5  # else the comparison would be of nothing
    for name, value in expected.items():
        if name == "names":
            assert found[name].tolist() == [word.decode() for word in value]
        else:
            assert found[name].dtype == value.dtype
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-4)


def test_bytes_of_mixed_sizes_are_answered_as_the_saved_model_answers(server, expected):
    with connect(server, "shapes") as ask:
        found = ask("serving_bytes", {"image_bytes": [png(picture(size)) for size in SIZES]})
    for i, one in enumerate(expected):
        assert_same({name: value[i] for name, value in found.items()}, one)
    assert "größe" in found["names"]  # UTF-8 through both


def test_images_are_answered_as_the_saved_model_answers(server, expected):
    with connect(server, "shapes", version=1) as ask:
        found = ask("serving_default", {"images": np.stack([picture(SIZES[0])] * 2)})
    for i in range(2):
        assert_same({name: value[i] for name, value in found.items()}, expected[0])


@pytest.mark.parametrize("bad", [b"", b"not an image", png(picture(SIZES[0]))[:150]], ids=["empty", "text", "cut"])
def test_bad_bytes_are_an_invalid_argument_and_the_server_goes_on(server, expected, bad):
    good = png(picture(SIZES[0]))
    with connect(server, "shapes") as ask:
        for batch in ([bad], [good, bad]):
            with pytest.raises(Refused):
                ask("serving_bytes", {"image_bytes": batch})
        found = ask("serving_bytes", {"image_bytes": [good]})
    assert_same({name: value[0] for name, value in found.items()}, expected[0])


# The command


@pytest.fixture
def folder(tmp_path):
    """Four images and two that are none, in the order of their names."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate(SIZES):
        (folder / f"{i}.png").write_bytes(png(picture(size)))
    (folder / "1a.jpg").write_bytes(b"no JPEG")
    (folder / "9.png").write_bytes(png(picture(SIZES[0]))[:150])
    return folder


@pytest.mark.parametrize("signature", ["bytes", "images"])
def test_a_bad_image_is_named_and_the_others_of_its_batch_are_done(
    server, folder, tmp_path, capsys, expected, signature
):
    out = tmp_path / "out"
    assert client.run([folder], out, server, "shapes", signature=signature, batch=4, repeat=2, min_score=0.5) == 1
    tree = json.loads((out / "detections.json").read_text(encoding="utf-8"))
    records = {record["image"]: record for record in tree["images"]}
    assert set(records) == {"0.png", "1.png", "1a.jpg", "2.png", "3.png", "9.png"} and len(tree["images"]) == 6
    assert "error" in records["1a.jpg"] and "error" in records["9.png"]
    for i, one in enumerate(expected):
        found = records[f"{i}.png"]["detections"]
        assert len(found) == one["num_detections"]
        np.testing.assert_allclose([row["box"] for row in found], one["boxes"][: len(found)], atol=1e-3)
        np.testing.assert_allclose([row["score"] for row in found], one["scores"][: len(found)], atol=1e-5)
        assert [row["category_id"] for row in found] == one["category_ids"][: len(found)].tolist()
        with Image.open(out / f"{i}.png.png") as drawn:
            assert drawn.size == SIZES[i][::-1]
    said = capsys.readouterr()
    assert "error: 1a.jpg: " in said.err and "error: 9.png: " in said.err and "0.png:" not in said.err
    shown = sum(int((one["scores"] >= 0.5).sum()) for one in expected)
    assert sum(line.split()[0] in records for line in said.out.splitlines()) == max(shown, 1)
    assert "4 of 6 images" in said.out
    # The four good ones of the first batch are sent alone after its refusal; pixels go in batches of one size.
    assert "8 requests" in said.out


def test_good_images_go_in_batches(double, folder, tmp_path, capsys):
    for name in ("1a.jpg", "9.png"):
        (folder / name).unlink()
    for signature, requests in (("bytes", 2), ("images", 4)):
        assert client.run([folder], tmp_path, double.grpc, "shapes", signature=signature, batch=3, repeat=1) == 0
        assert f"{requests} requests" in capsys.readouterr().out
    (folder / "1.png").unlink()
    client.run([folder], tmp_path, double.grpc, "shapes", signature="images", batch=3, repeat=5)  # two of one size
    assert "10 requests" in capsys.readouterr().out


def test_latency_by_hand():
    line = client.latency([0.01 * i for i in range(1, 102)], 202)  # 10 to 1010 ms; the median is the 51st
    assert line.startswith("101 requests, one at a time: median 510.0 ms, 90% within 910.0 ms, 99% within 1000.0 ms; ")
    assert line.endswith(" 3.92 images/s")  # 202 in 51.51 s


def test_the_command_needs_no_tensorflow(double, folder, tmp_path):
    code = (
        "import sys, runpy\ntry: runpy.run_module('retinanet_keras', run_name='__main__')\nexcept SystemExit as end:\n"
        "    print(end.code, {'tensorflow', 'keras', 'tensorflow_serving'} & set(sys.modules))"
    )
    arguments = ["client", folder / "0.png", "--server", double.grpc, "--model", "shapes", "--to", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments), "--min-score", "0.9"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 set()", done.stdout + done.stderr
    assert (tmp_path / "out" / "0.png.png").exists()


# What can be wrong


def test_no_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for scheme in ("grpc", "http"):
        with connect(f"{scheme}://127.0.0.1:{port}", "shapes") as ask:
            with pytest.raises(ServerError, match="No server answers at .*Is it running"):
                ask("serving_bytes", {"image_bytes": [b"x"]})


def test_a_server_of_something_else(double):
    """Ports confused: gRPC asked by HTTP, and the other way round."""
    for scheme, address in (("http", double.grpc), ("grpc", double.rest)):
        with connect(f"{scheme}://{address.split('//')[1]}", "shapes", timeout=120) as ask:
            with pytest.raises(ServerError, match="8500 for gRPC and 8501 for REST"):
                ask("serving_bytes", {"image_bytes": [b"x"]})


def test_no_such_model_version_or_signature(server):
    image = [png(picture(SIZES[0]))]
    for options, answer in (
        ({"model": "boxes"}, r"has no model boxes \(Servable not found for request: Latest\(boxes\)\)"),
        ({"model": "shapes", "version": 7}, "has no model shapes, version 7 "),
    ):
        with connect(server, **options) as ask, pytest.raises(ServerError, match=answer):
            ask("serving_bytes", {"image_bytes": image})
    with connect(server, "shapes") as ask, pytest.raises(UserError, match='signature key "nonsense" not found'):
        ask("nonsense", {"image_bytes": image})


def test_an_answer_that_comes_too_late(double, server, monkeypatch):
    """The server waits for the end of the client's patience, however slow the machine is."""
    image, predict, gone = {"image_bytes": [png(picture(SIZES[0]))]}, double.servable.predict, threading.Event()
    with connect(server, "shapes") as ask:
        ask("serving_bytes", image)  # the first one may take long
    monkeypatch.setattr(double.servable, "predict", lambda *args: (gone.wait(), predict(*args))[1])
    with connect(server, "shapes", timeout=3) as ask:
        try:
            with pytest.raises(ServerError, match="within 3 s.*--timeout"):
                ask("serving_bytes", {"image_bytes": [b"x"]})
        finally:
            gone.set()
        monkeypatch.undo()
        found = ask("serving_bytes", image)  # and not the answer of before
    assert found["num_detections"][0] > 5


def test_requests_and_answers_above_grpcs_default_limit(tiny_export, double, monkeypatch):
    """4 MB, which TF Serving lifts for requests; a server behind a proxy may not."""
    images = np.zeros((1, 1200, 1200, 3), "uint8")  # 4.3 MB
    with connect(double.grpc, "shapes") as ask:
        assert ask("serving_default", {"images": images})["boxes"].shape[0] == 1
    with Double(tiny_export, max_message=None) as small, connect(small.grpc, "shapes") as ask:
        with pytest.raises(ServerError, match="so large a request.*Lower --batch"):
            ask("serving_default", {"images": images})
    predict = double.servable.predict

    def many(*args):
        outputs = predict(*args)
        rows = {name: np.repeat(value, 1000, axis=1) for name, value in outputs.items() if value.ndim > 1}
        return {**outputs, **rows}  # boxes of 4.8 MB

    monkeypatch.setattr(double.servable, "predict", many)
    with connect(double.grpc, "shapes") as ask:
        found = ask("serving_bytes", {"image_bytes": [png(picture(SIZES[0]))] * 3})
    assert found["boxes"].shape == (3, 100_000, 4)


def test_another_model_is_told_apart(double, server, monkeypatch):
    outputs = {name: np.ones((1, 2), "float32") for name in ("boxes", "scores")}
    monkeypatch.setattr(double.servable, "predict", lambda *_: outputs)
    with connect(server, "shapes") as ask:
        with pytest.raises(ServerError, match="by this package: no output category_ids, .*, but boxes, scores"):
            ask("serving_bytes", {"image_bytes": [b"x"]})


def test_a_rest_server_that_drops_idle_connections_is_asked_again(double, monkeypatch):
    image = {"image_bytes": [png(picture(SIZES[0]))]}
    with connect(double.rest, "shapes") as ask:
        rest = double.rest_server.RequestHandlerClass
        end_headers = rest.end_headers
        monkeypatch.setattr(rest, "end_headers", lambda self: (end_headers(self), setattr(self, "close_connection", 1)))
        first = ask("serving_bytes", image)
        time.sleep(0.1)
        np.testing.assert_array_equal(ask("serving_bytes", image)["scores"], first["scores"])


@pytest.mark.parametrize("address", [
    "localhost:8500", "https://host:1", "grpc://host", "http://host:x", "grpc://:1", "http://[", "http://[::1", "http://h:0",
    "http://h:99999", "http://h:٣", "http://h:1/path", "http://h h:1", "http://h:1\n", "",
])  # fmt: skip
def test_addresses_that_are_none(address):
    with pytest.raises(UserError, match="--server: expected grpc://HOST:8500 or http://HOST:8501, got"):
        with connect(address, "shapes"):
            pass


def test_arguments_are_checked_before_anything_is_sent(tmp_path):
    wrong = [({"batch": 0}, "--batch"), ({"repeat": -1}, "--repeat")]
    wrong += [({"timeout": seconds}, "--timeout") for seconds in (0, float("inf"), float("nan"))]
    for options, answer in wrong:
        with pytest.raises(UserError, match=answer):
            client.run([tmp_path], tmp_path, "grpc://nowhere:1", "shapes", **options)
    with pytest.raises(DataError, match="holds no image files"):
        client.run([tmp_path], tmp_path, "grpc://nowhere:1", "shapes")


# The double keeps TF Serving's documented rules, and the configurations are what the server reads


def post(url, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data)) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_rows_and_columns_are_answered_alike(double):
    item = {"b64": base64.b64encode(png(picture(SIZES[0]))).decode()}
    url, name = f"{double.rest}/v1/models/shapes", {"signature_name": "serving_bytes"}
    bodies = [
        {**name, "inputs": {"image_bytes": [item]}}, {**name, "inputs": [item]}, {**name, "instances": [item]},
        {**name, "instances": [{"image_bytes": item}]},
    ]  # fmt: skip
    columns, plain, row, named_row = [post(f"{url}:predict", body) for body in bodies]
    assert columns[0] == plain[0] == row[0] == named_row[0] == 200
    assert columns == plain == post(f"{url}/versions/1:predict", bodies[0]) and row == named_row
    assert row[1] == {"predictions": [{key: value[0] for key, value in columns[1]["outputs"].items()}]}
    pixels = picture(SIZES[0]).tolist()
    assert post(f"{url}:predict", {"instances": [pixels]})[0] == post(f"{url}:predict", {"inputs": [pixels]})[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"{", [], {}, {"instances": [], "inputs": []}, {"instances": []}, {"inputs": {"pixels": []}},
        {"instances": [[[[1.5, 0, 0]]]]}, {"instances": [[[[256, 0, 0]]]]}, {"instances": [[[[True, 0, 0]]]]},
        {"instances": [[[[1, 2, 3]], [[1, 2]]]]}, {"instances": ["text"]}, {"instances": [[1, 2]]},
        {"signature_name": 3, "instances": [1]}, {"signature_name": "serving_bytes", "instances": [{"b64": "?"}]},
        {"signature_name": "serving_bytes", "instances": [{"b64": "AA==", "x": 1}]},
    ],
    ids=str,
)  # fmt: skip
def test_bodies_against_the_rules_are_400_with_an_error(double, body):
    status, answer = post(f"{double.rest}/v1/models/shapes:predict", body)
    assert status == 400 and list(answer) == ["error"] and answer["error"]


def test_status_and_metadata(double):
    with urllib.request.urlopen(f"{double.rest}/v1/models/shapes") as answer:
        (version,) = json.loads(answer.read())["model_version_status"]
    assert (version["version"], version["state"], version["status"]["error_code"]) == ("1", "AVAILABLE", "OK")
    with urllib.request.urlopen(f"{double.rest}/v1/models/shapes/versions/1/metadata") as answer:
        tree = json.loads(answer.read())
    assert tree["model_spec"]["version"] == "1"
    signatures = tree["metadata"]["signature_def"]["signature_def"]
    assert signatures["serving_bytes"]["inputs"]["image_bytes"]["dtype"] == "DT_STRING"
    assert set(signatures["serving_default"]["outputs"]) == set(answers.OUTPUTS)
    assert post(f"{double.rest}/v1/models/boxes:predict", {"instances": [1]}) == (
        404, {"error": "Servable not found for request: Latest(boxes)"},
    )  # fmt: skip


# session_bundle_config.proto and monitoring_config.proto of TF Serving, which its Python package leaves out.
SERVER_PROTOS = """
name: "server.proto" syntax: "proto3" dependency: "google/protobuf/wrappers.proto"
message_type { name: "BatchingParameters"
  field { name: "max_batch_size" number: 1 type: TYPE_MESSAGE type_name: ".google.protobuf.Int64Value" }
  field { name: "batch_timeout_micros" number: 2 type: TYPE_MESSAGE type_name: ".google.protobuf.Int64Value" }
  field { name: "max_enqueued_batches" number: 3 type: TYPE_MESSAGE type_name: ".google.protobuf.Int64Value" }
  field { name: "num_batch_threads" number: 4 type: TYPE_MESSAGE type_name: ".google.protobuf.Int64Value" }
  field { name: "allowed_batch_sizes" number: 6 type: TYPE_INT64 label: LABEL_REPEATED }
  field { name: "pad_variable_length_inputs" number: 7 type: TYPE_BOOL } }
message_type { name: "PrometheusConfig"
  field { name: "enable" number: 1 type: TYPE_BOOL } field { name: "path" number: 2 type: TYPE_STRING } }
message_type { name: "MonitoringConfig"
  field { name: "prometheus_config" number: 1 type: TYPE_MESSAGE type_name: ".PrometheusConfig" } }
"""


def test_the_servers_configurations_are_its_protos():
    folder = ROOT / "configs" / "serving"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(text_format.Parse(SERVER_PROTOS, descriptor_pb2.FileDescriptorProto()))

    def read(name, message):
        return text_format.Parse((folder / name).read_text(), message())

    def of_pool(name):
        return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))

    models = read("models.config", model_server_config_pb2.ModelServerConfig)
    (model,) = models.model_config_list.config
    assert (model.name, model.model_platform) == ("shapes", "tensorflow")
    assert model.model_version_policy.latest.num_versions == 2
    batching = read("batching.config", of_pool("BatchingParameters"))
    sizes = list(batching.allowed_batch_sizes)  # rising, and ending with the largest, as the server demands
    assert sizes == sorted(set(sizes)) and sizes[-1] == batching.max_batch_size.value
    assert batching.num_batch_threads.value >= 1 and not batching.pad_variable_length_inputs
    monitoring = read("monitoring.config", of_pool("MonitoringConfig"))
    assert monitoring.prometheus_config.enable and monitoring.prometheus_config.path.startswith("/")
    named = (folder / "models.config").read_text() + (ROOT / "docs" / "serving.md").read_text()
    assert all(path.name in named for path in folder.iterdir())
