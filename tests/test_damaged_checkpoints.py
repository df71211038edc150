"""Damaged checkpoints: the newest whole one is restored bit for bit, or one sentence says why not."""

import random
import shutil

import numpy as np
import pytest
import tensorflow as tf

from retinanet_keras.errors import RunError
from retinanet_keras.training.resume import Checkpoints, load_run
from retinanet_keras.training.run_folder import RunFolder

SUFFIXES = (".index", ".data-00000-of-00001")


def state(checkpoints):
    """All that was restored, NumPy."""
    model = checkpoints.model
    return [variable.numpy() for variable in [*model.variables, *model.optimizer.variables]]


@pytest.fixture(scope="module")
def trained(finished):
    """The model of a finished run, and {step: what its checkpoint holds}."""
    _, model = load_run(finished[0].path)
    steps = {}
    for step in finished[0].steps():
        checkpoints = Checkpoints(model, finished[0], 3)
        checkpoints.checkpoint.restore(str(finished[0].checkpoints / f"step-{step}")).assert_consumed()
        steps[step] = state(checkpoints)
    assert sorted(steps) == [3, 4, 6]
    return model, steps


def damage(content, rng):
    """Bytes that a bad disk, an interrupted copy or another program may leave in the place of these."""
    at = rng.randrange(len(content))
    return rng.choice((
        lambda: content[:at],
        lambda: content[: rng.randrange(min(100, len(content)))],
        lambda: content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :],
        lambda: content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :],
        lambda: content[:at] + rng.randbytes(64) + content[at + 64 :],
        lambda: rng.randbytes(len(content)),
        lambda: content + rng.randbytes(100),
        lambda: content[at:] + content[:at],
    ))()  # fmt: skip


def check(model, steps, folder, caplog):
    """Restore, and compare with what the step's checkpoint held; the step, 0 where none could be read."""
    caplog.clear()
    checkpoints = Checkpoints(model, folder, 3)
    try:
        step = checkpoints.restore()
    except RunError as error:
        assert "cannot be read" in str(error) and "--workdir" in str(error) and "\n" not in str(error)
        return 0
    for ours, theirs in zip(state(checkpoints), steps[step], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if step < 6 and (folder.checkpoints / "step-6.index").exists():
        assert "step-6 cannot be read" in caplog.text
    return step


@pytest.mark.slow
def test_mutated_checkpoints_fall_back_or_are_told(trained, finished, tmp_path, caplog):
    model, steps = trained
    reached = []
    for number in range(60):
        rng = random.Random(number)
        folder = RunFolder(tmp_path / str(number))
        shutil.copytree(finished[0].checkpoints, folder.checkpoints)
        victims = [f"step-{step}{suffix}" for step in ((6,), (6, 4), (6, 4, 3))[number % 3] for suffix in SUFFIXES]
        for name in rng.sample(victims, rng.randint(1, len(victims))):
            path = folder.checkpoints / name
            path.unlink() if rng.random() < 0.1 else path.write_bytes(damage(path.read_bytes(), rng))
        if number % 4 == 0:
            (folder.checkpoints / "checkpoint").write_bytes(rng.randbytes(rng.choice((0, 50))))
        reached.append(check(model, steps, folder, caplog))
        shutil.rmtree(folder.path)
    assert {0, 3, 4, 6} == set(reached), reached


def test_a_shard_that_was_cut_off_falls_back(trained, finished, tmp_path, caplog):
    model, steps = trained
    shutil.copytree(finished[0].checkpoints, tmp_path / "run/checkpoints")
    folder = RunFolder(tmp_path / "run")
    shard = folder.checkpoints / f"step-6{SUFFIXES[1]}"
    whole = shard.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:length])
        assert check(model, steps, folder, caplog) == 4


def test_an_index_without_data_is_no_checkpoint(tiny_config, data_dir, trained, finished, tmp_path, caplog):
    model, steps = trained
    shutil.copytree(finished[0].path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    (folder.checkpoints / "step-20260101.index").write_text("notes")
    assert folder.steps() == [3, 4, 6]
    folder.start(tiny_config(data_dir), folder.categories())
    assert check(model, steps, folder, caplog) == 6 and "step-20260101 cannot be read" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\xff\x00 no text", b'model_checkpoint_path: "elsewhere/step-9"\n'])
def test_a_damaged_list_of_checkpoints_is_rewritten(trained, finished, tmp_path, caplog, content):
    """And a user's own copies beside them are left alone."""
    model, steps = trained
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(finished[0].checkpoints, folder.checkpoints)
    (folder.checkpoints / "checkpoint").write_bytes(content)
    for suffix in SUFFIXES:
        shutil.copyfile(folder.checkpoints / f"step-6{suffix}", folder.checkpoints / f"step-6.bak{suffix}")
    assert check(model, steps, folder, caplog) == 6
    checkpoints = Checkpoints(model, folder, 3)
    checkpoints.restore()
    checkpoints.step = 8
    checkpoints.save()
    assert folder.steps() == [4, 6, 8] and (folder.checkpoints / "step-6.bak.index").exists()
    assert tf.train.latest_checkpoint(folder.checkpoints) == str(folder.checkpoints / "step-8")
    assert Checkpoints(model, folder, 3).restore() == 8
