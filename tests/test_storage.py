"""Writing in one step, and locks: what is there after an error, a kill, and beside another process."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from retinanet_keras import errors
from retinanet_keras.errors import UserError
from retinanet_keras.storage import disk

pytestmark = pytest.mark.check


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / ("é" * 120 + ".json")  # 245 bytes: no room for a longer name beside it
    disk.write(path, "old")
    with disk.replacing(path) as partial:
        partial.write_text("ne")
        assert path.read_text() == "old"
        partial.write_text("new")
    assert path.read_text() == "new" and files(tmp_path) == [path.name]
    disk.write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"


def test_a_damaged_file_is_copied_once_to_a_free_name_and_stays(tmp_path):
    path = tmp_path / "a.json"
    for content, name in (("1", "a.json.damaged"), ("1", "a.json.damaged"), ("2", "a.json.damaged-2"),
                          ("1", "a.json.damaged")):  # fmt: skip
        path.write_text(content)
        assert disk.set_aside(path) == tmp_path / name
        assert path.read_text() == (tmp_path / name).read_text() == content
    assert files(tmp_path) == ["a.json", "a.json.damaged", "a.json.damaged-2"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path, error):
    disk.write(tmp_path / "a.keras", "old")
    with pytest.raises(error), disk.replacing(tmp_path / "a.keras") as partial:
        assert partial.name.endswith(".keras")
        partial.write_text("half")
        raise error
    assert files(tmp_path) == ["a.keras"] and (tmp_path / "a.keras").read_text() == "old"


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_replaced_when_it_is_whole(tmp_path, monkeypatch, there, exchange):
    if not exchange:
        monkeypatch.setattr(disk.sys, "platform", "other")
    path = tmp_path / "deep/1"
    if there:
        path.mkdir(parents=True)
        (path / "old").write_text("old")
    with disk.replacing_folder(path) as partial:
        (partial / "new").write_text("new")
        assert path.exists() == there
    assert files(tmp_path) == ["deep", "deep/1", "deep/1/new"]
    with pytest.raises(ZeroDivisionError), disk.replacing_folder(path):
        raise ZeroDivisionError
    assert files(tmp_path) == ["deep", "deep/1", "deep/1/new"]


@pytest.mark.parametrize("without_replacing", [True, False])
def test_a_new_folder_takes_no_place_that_is_taken(tmp_path, monkeypatch, without_replacing):
    if not without_replacing:
        monkeypatch.setattr(disk.sys, "platform", "other")
    asked = []

    def choose():
        asked.append(next(tmp_path / str(n) for n in range(1, 99) if not (tmp_path / str(n)).exists()))
        return asked[-1]

    (tmp_path / "1").write_text("a file")
    with disk.new_folder(choose) as made:
        (made.path / "mine").write_text("mine")
        monkeypatch.setattr(disk.time, "sleep", None)
        (tmp_path / "2").mkdir()  # another process was faster
        (tmp_path / "2/theirs").write_text("theirs")
        first = asked[-1]
        asked.clear()
    assert first.name == "2" and made.path.name == "3"
    assert files(tmp_path) == ["1", "2", "2/theirs", "3", "3/mine"]


def test_between_choosing_and_moving_another_may_take_the_place(tmp_path):
    def choose():
        free = [tmp_path / str(n) for n in (1, 2) if not (tmp_path / str(n)).exists()]
        if len(taken) == 1:  # asked the second time: taken right after
            free[0].mkdir()
        taken.append(free[0])
        return free[0]

    taken = []
    with disk.new_folder(choose) as made:
        (made.path / "a").write_text("a")
    assert made.path == tmp_path / "2" and files(tmp_path) == ["1", "2", "2/a"]


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    child = (
        "import os, sys; from pathlib import Path; from retinanet_keras.storage import disk\n"
        "with disk.replacing(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os._exit(9)"
    )
    path = tmp_path / "a.json"
    path.write_text("old")
    assert subprocess.run([sys.executable, "-c", child, path]).returncode == 9
    assert path.read_text() == "old" and len(files(tmp_path)) == 2
    disk.write(path, "new")
    assert files(tmp_path) == ["a.json"] and path.read_text() == "new"


HOLD = (
    "import sys; from retinanet_keras.storage import disk\n"
    "with disk.locked(sys.argv[1], 'training'):\n"
    "    print('held', flush=True); sys.stdin.read()"
)


def test_a_lock_keeps_others_out_until_its_process_ends(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    for _ in range(2):  # being refused does not forget who holds it
        with pytest.raises(errors.InUse, match=f"is in use: training, process {child.pid} on .*, since 20"):
            with disk.locked(tmp_path, "exporting"):
                raise AssertionError("two hold it")
    child.kill()
    child.communicate()
    with disk.locked(tmp_path, "exporting"), pytest.raises(errors.InUse, match="exporting"):
        with disk.locked(tmp_path, "again"):
            raise AssertionError("two hold it")
    with disk.locked(tmp_path, "again"):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", no_locks)
    with disk.locked(tmp_path, "training"):
        assert "cannot be locked (No locks available)" in caplog.text


def test_writers_of_several_processes_and_threads_leave_one_of_their_contents(tmp_path):
    path = tmp_path / "a.txt"
    child = (
        "import sys; from retinanet_keras.storage import disk\n"
        "for n in range(20): disk.write(sys.argv[1], sys.argv[2] * 5000)"
    )
    children = [subprocess.Popen([sys.executable, "-c", child, path, letter]) for letter in "ab"]
    seen, over = set(), threading.Event()

    def read():
        while not over.is_set():
            if path.exists():
                seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    assert [process.wait() for process in children] == [0, 0]
    over.set()
    reader.join()
    assert seen and seen <= {"a" * 5000, "b" * 5000} and files(tmp_path) == ["a.txt"]


def test_a_digest_is_of_the_content():
    a = np.arange(6, dtype="float32")
    assert disk.digest(a, {"b": 1, "a": [2]}) == disk.digest(a.copy(), {"a": [2], "b": 1})
    different = [
        disk.digest(a), disk.digest(a.reshape(2, 3)), disk.digest(a.astype("float64")), disk.digest(a + 1),
        disk.digest(a.tobytes()), disk.digest("x", "y"), disk.digest("xy"), disk.digest(),
    ]  # fmt: skip
    assert len(set(different)) == len(different) and all(len(one) == 16 for one in different)


def test_the_number_of_this_process_may_have_been_anothers(tmp_path):
    with pytest.raises(SystemExit), disk.replacing(tmp_path / "a") as partial:
        name = partial.name
        raise SystemExit
    (tmp_path / name).write_text("of a process of this number, before")
    assert str(os.getpid()) in name
    disk.write(tmp_path / "a", "new")
    assert files(tmp_path) == ["a"]


def test_places_are_checked_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("folder", "new", "folder/new/below", "."):
        disk.check_folder(tmp_path / place, "--to")
    for place in ("file", "file/below", "link", "link/below/it"):
        with pytest.raises(UserError, match=r"^--to: .*/(file|link) is not a folder\. Name another"):
            disk.check_folder(tmp_path / place, "--to")
    for place in ("file", "new", "folder/new"):
        disk.check_file(tmp_path / place, "--onnx")
    for place, answer in (("folder", "folder is a folder. Name a file in it"), ("file/a", "file is not a folder")):
        with pytest.raises(UserError, match=f"^--onnx: .*{answer}"):
            disk.check_file(tmp_path / place, "--onnx")


def test_several_threads_write_to_one_place(tmp_path):
    """The unfinished file of one is not taken for a dead process's by another."""

    def write(number):
        for _ in range(20):
            with disk.replacing(tmp_path / "a") as partial:
                partial.write_text(str(number))
                time.sleep(0.001)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert (tmp_path / "a").read_text() in "0123" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_in_the_place_of_a_file_is_told(tmp_path):
    for name in ("a", disk.LOCK):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="a is a folder, and a file is written there"):
        disk.write(tmp_path / "a", "text")
    with pytest.raises(UserError, match=r"\.lock is a folder"), disk.locked(tmp_path, "testing"):
        pass
