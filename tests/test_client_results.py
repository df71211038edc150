"""What the client writes, draws and says, whatever a server answers and whatever the images are."""

import contextlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripted_server import D, answer, good, http, serving

from retinanet_keras.errors import ServerError, UserError
from retinanet_keras.serving import client, conversation
from retinanet_keras.serving.conversation import connect

pytestmark = pytest.mark.check

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rest():
    with serving() as server:
        yield server


@pytest.fixture
def images(tmp_path):
    """Five images in the order of their names."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (40, 30), (i, 50, 90)).save(folder / f"{i}.png")
    return folder


def read(folder):
    return json.loads((folder / client.RESULTS_FILE).read_bytes().decode("utf-8"))["images"]


def test_a_failure_leaves_the_answers_before_it(rest, images, tmp_path):
    rest.replies[:] = [answer(), answer(), http(b'{"error": "overloaded"}', "503 Service Unavailable")]
    out = tmp_path / "out"
    with pytest.raises(ServerError, match=r"overloaded.* The detections until then, of 2 images, are in .*\.json"):
        client.run([images], out, rest.address, "shapes")
    assert [record["image"] for record in read(out)] == ["0.png", "1.png"]
    assert all(len(record["detections"]) == 3 for record in read(out))
    with pytest.raises(ServerError) as told:  # nothing was answered: what was there stays
        client.run([images], out, rest.address, "shapes")
    assert len(read(out)) == 2 and "until then" not in str(told.value)


def test_the_results_are_whole_after_each_answer(rest, images, tmp_path, monkeypatch):
    seen, show = [], client._show
    rest.replies[:] = [answer()]

    def look(path, name, *rest):
        seen.append([record["image"] for record in read(tmp_path / "out")])
        show(path, name, *rest)
        if len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(client, "_show", look)
    monkeypatch.setattr(client, "time", types.SimpleNamespace(monotonic=lambda: 0.0))  # writing takes no time
    with pytest.raises(KeyboardInterrupt):
        client.run([images], tmp_path / "out", rest.address, "shapes")
    names = [f"{i}.png" for i in range(5)]
    assert seen == [names[: n + 1] for n in range(4)] and len(read(tmp_path / "out")) == 4


def test_writing_the_results_takes_no_more_than_a_tenth_of_the_time(tmp_path, monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr(client.time, "monotonic", lambda: now[0])

    def write(path, text):
        written.append(len(json.loads(text)["images"]))
        now[0] += 1.0  # a second each

    monkeypatch.setattr(client.disk, "write", write)
    with client._Results(tmp_path / "a", "s", "m", "b") as results:
        for _ in range(100):
            now[0] += 0.5
            results.add({"image": "a", "error": "b"})
    assert written[0] == 1 and written[-1] == 100 and len(written) <= 8


ODD = (
    b"caf\xe9.png", b"\xff\xfe.png", b"\x1b[2J\x1b]0;title\x07.png", b"new\nline.png", "größe 木.png".encode(),
    b"l" * 251 + b".png", "木".encode() * 83 + b".png", b"-x.png",
)  # fmt: skip


def test_file_names_of_every_kind(rest, tmp_path):
    """Not UTF-8, of 255 bytes, with commands to the terminal: in a process of its own, whose output is UTF-8."""
    folder, out = os.fsencode(tmp_path / "images"), tmp_path / "out"
    os.mkdir(folder)
    Image.new("RGB", (40, 30)).save(tmp_path / "one.png")
    for name in ODD:
        Path(os.fsdecode(os.path.join(folder, name))).write_bytes((tmp_path / "one.png").read_bytes())
    Path(os.fsdecode(os.path.join(folder, b"bad\x1b[2J\xff.gif"))).write_bytes(b"no image")
    rest.replies[:] = [answer(names=[["\x1b[2J\ud800" + "m" * 100_000] * D])]
    arguments = [os.fsdecode(folder), "--server", rest.address, "--model", "shapes", "--to", out]
    done = subprocess.run(
        [sys.executable, "-m", "retinanet_keras", "client", *map(str, arguments), "--signature", "images"],
        capture_output=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr.decode()
    said = (done.stdout + done.stderr).decode("utf-8")
    assert "Traceback" not in said and "\x1b" not in said and "\x07" not in said and r"\x1b[2J" in said
    assert r"caf\xe9.png" in said and "größe 木.png" in said and r"error: bad\x1b[2J\xff.gif: " in said
    records = {os.fsencode(record["image"]): record for record in read(out)}
    assert set(records) == {*ODD, b"bad\x1b[2J\xff.gif"} and sum("error" in record for record in records.values()) == 1
    drawn = {os.fsencode(path.name) for path in out.rglob("*.png")}
    assert len(drawn) == len(ODD) and all(len(name) <= 255 for name in drawn)


def test_labels_and_detections_of_any_number_are_drawn_at_once(rest, images, tmp_path):
    many = {name: [[row[0][0]] * 20_000] for name, row in good(1).items() if name != "num_detections"}
    many |= {"labels": [[2**31 - 1] * 20_000], "num_detections": [20_000]}
    rest.replies[:] = [answer(**many)]
    assert client.run([images / "0.png"], tmp_path / "out", rest.address, "shapes", min_score=0.9) == 0
    assert client.run([images / "0.png"], tmp_path / "out", rest.address, "shapes", min_score=0.1) == 0
    assert len(read(tmp_path / "out")[0]["detections"]) == 20_000 and (tmp_path / "out/0.png.png").exists()


@pytest.mark.parametrize("signature", ["bytes", "images"])
def test_damaged_images_of_other_formats_and_giants_cost_no_other_image(rest, images, tmp_path, capsys, signature):
    """Pillow has readers for these that fail with errors of their own."""
    pixel_format = struct.pack("<2I4s5I", 32, 4, b"none", *[0] * 5)
    dds = b"DDS " + struct.pack("<7I44x", 124, 0x1007, 30, 40, 0, 0, 0) + pixel_format + bytes(20)
    avif, giant = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (40, 30)).save(avif, "AVIF")
    Image.new("RGB", (8, 8)).save(giant, "BMP")
    giant.seek(18)
    giant.write(struct.pack("<ii", 9400, 9400))
    for i, data in enumerate((dds, avif.getvalue()[:-9] + bytes(9), giant.getvalue())):
        (images / f"{i}.png").write_bytes(data)
    rest.replies[:] = [answer()]
    status = client.run([images], tmp_path / "out", rest.address, "shapes", signature=signature)
    told, failed = capsys.readouterr().err, [record["image"] for record in read(tmp_path / "out") if "error" in record]
    assert told.count("cannot be read as an image") == 2
    assert "2.png has 88,360,000 pixels by its header, more than the 64,000,000 that exports take" in told
    assert (status, failed) == ((1, ["0.png", "1.png", "2.png"]) if signature == "images" else (0, []))
    drawn = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"3.png.png", "4.png.png"}


@pytest.mark.parametrize("shape", [(2, 3, 5, 3), (1, 2, 9000, 3), (0, 4, 4, 3)])
def test_the_json_of_pixels_is_that_of_their_nested_lists_in_pieces(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, "uint8")
    pieces = list(conversation._to_json(pixels))
    assert json.loads(b"".join(pieces)) == pixels.tolist() and max(map(len, pieces)) < 70_000


def test_a_request_takes_little_more_memory_than_its_json(rest):
    rest.replies[:] = [answer()]
    pixels = np.full((1, 200, 300, 3), 200, "uint8")
    with connect(rest.address, "shapes") as ask:
        tracemalloc.start()
        ask("serving_default", {"images": pixels})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * len("200,") * pixels.size  # once of these is the server's, which is in this process


def test_output_paths_that_cannot_be_are_told_before_anything_is_sent(images, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "out/detections.json").mkdir(parents=True)
    for to, told in (
        ("file", "file is not a folder"),
        ("file/x", "file is not a folder"),
        ("out", "json is a folder"),
    ):
        with pytest.raises(UserError, match=f"^--to: .*{told}"):
            client.run([images], tmp_path / to, "http://127.0.0.1:1", "shapes")


def test_a_picture_whose_place_is_taken(rest, images, tmp_path):
    (tmp_path / "out/0.png.png").mkdir(parents=True)
    rest.replies[:] = [answer()]
    with pytest.raises(UserError, match=r"0\.png\.png is a folder"):
        client.run([images], tmp_path / "out", rest.address, "shapes")
    assert len(read(tmp_path / "out")) == 1


@pytest.mark.parametrize("server", [
    "http://user:secret@127.0.0.1:1", "grpc://user:secret@127.0.0.1:1", "user:secret@127.0.0.1:1", "http://secret@h",
    "http://127.0.0.1:1?key=secret", "http://127.0.0.1:1/#secret", "http://:secret@h:1/x", "http://h:1\n?key=\nsecret",
    "http://user:se/cret@h:8501", "http:/user:secret@h:8501", "//user:secret@h", "http:///user:secret@h:8501",
    "http://h:8501;key=secret", "http://token/secret@h:8501", "secret://h:1", "grpc://secret", "https://secret:1",
])  # fmt: skip
def test_no_secret_of_an_address_is_shown(server, images, tmp_path):
    with pytest.raises(UserError, match="^--server: expected grpc://HOST:8500") as told:
        client.run([images], tmp_path / "out", server, "shapes")
    assert not {"cret", "secret", "user"} & set(re.findall("[a-z]+", str(told.value)))


@pytest.mark.parametrize("server", ["http://a..b:1", f"http://{'a' * 70}.b:1", "http://[::ff:zz]:1", "http://é:1"])
def test_hosts_that_are_none(server):
    with contextlib.suppress(UserError), connect(server, "shapes", timeout=5) as ask:
        with pytest.raises(ServerError, match="No server answers at"):
            ask("serving_bytes", {"image_bytes": [b"first", b"second"]})


def test_names_and_versions_that_no_server_has():
    for options, told in (
        ({"model": "caf\udce9"}, "--model: expected a name in UTF-8"), ({"version": -1}, "--version: expected 0 to"),
        ({"version": 10**400}, "--version: expected 0 to"),
    ):  # fmt: skip
        for scheme in ("grpc", "http"):
            with pytest.raises(UserError, match=told), connect(f"{scheme}://h:1", **{"model": "m", **options}):
                pass
