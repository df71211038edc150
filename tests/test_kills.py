"""Runs that are killed, at random moments, alone or one of two workers, and end as if they had not been."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

ROOT = Path(__file__).parents[1]
SMALL = (
    "data.short_side=96 data.max_side=96 data.shapes.train_images=40 data.shapes.val_images=4 "
    "data.shapes.test_images=4 data.shapes.side=128 model.norm=group model.width=8 model.fpn_channels=16 "
    "model.head_depth=1 train.log_every=5 eval.pictures=1"
).split()


def start(workdir, data, *settings, worker=None, addresses=()):
    """`train.py` on configs/shapes.json, its output in a file beside its folder."""
    command = [sys.executable, "train.py", "--config", "configs/shapes.json", "--workdir", str(workdir)]
    environment = dict(os.environ)
    if worker is not None:
        environment["TF_CONFIG"] = json.dumps(
            {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": worker}}
        )
    output = workdir.with_name(f"{workdir.name}-{worker or 0}.txt")
    with open(output, "w") as file:
        process = subprocess.Popen(
            [*command, "--set", f"data.dir={data}", *settings], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    return process, output


def finish(*args, **kwargs):
    process, output = start(*args, **kwargs)
    assert process.wait() == 0, output.read_text()[-3000:]


def wait_for(words, output, process, seconds=1800):
    """Return when a process has printed something."""
    end = time.monotonic() + seconds
    while words not in output.read_text():
        assert process.poll() is None and time.monotonic() < end, output.read_text()[-3000:]
        time.sleep(0.05)


def state(workdir):
    """All of the newest checkpoint: weights, slots and step."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(workdir / "checkpoints"))
    names = [name for name in sorted(reader.get_variable_to_shape_map()) if name.endswith("VARIABLE_VALUE")]
    return {name: np.asarray(reader.get_tensor(name)) for name in names}


def check_same(first, second, atol=0.0):
    ours, theirs = state(first), state(second)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=atol, err_msg=name)


def seconds_to_a_checkpoint(workdir, data, *settings):
    """Let a run finish; from its first words to its first checkpoint."""
    process, output = start(workdir, data, *settings)
    wait_for("Training resnet18", output, process)
    began = time.monotonic()
    while not list((workdir / "checkpoints").glob("step-*.index")):
        assert process.poll() is None, output.read_text()[-3000:]
        time.sleep(0.02)
    seconds = time.monotonic() - began
    assert process.wait() == 0, output.read_text()[-3000:]
    return seconds


def newest(workdir):
    """The step of the newest checkpoint; 0: none."""
    steps = [int(path.stem.removeprefix("step-")) for path in (workdir / "checkpoints").glob("step-*.index")]
    return max(steps, default=0)


def kill_again_and_again(workdir, data, kills, longest, *settings):
    """Kill -9 at random times, and then let it finish. The steps gone on from.

    By turns up to `longest` s after the first words, before there is a step, and up to a second after one of the next
    three checkpoints: so it makes progress, and not too much, on a machine of any speed.
    """
    rng, steps = random.Random(0), []
    for number in range(kills):
        before = newest(workdir)
        process, output = start(workdir, data, *settings)
        wait_for("Training resnet18", output, process)
        if number % 2:
            more, seen = rng.randint(1, 3), {before}
            while len(seen) <= more:
                seen.add(newest(workdir))
                assert process.poll() is None, output.read_text()[-3000:]
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 1))
        else:
            time.sleep(rng.uniform(0, longest))
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
        steps += [int(step) for step in re.findall(r"Resuming from step (\d+)", output.read_text())]
    finish(workdir, data, *settings)
    return steps


@pytest.mark.slow
def test_twenty_kills_at_random_moments_leave_no_trace(tmp_path):
    """Of configs/shapes.json on small images, with many checkpoints, evaluations and best weights to be killed in."""
    settings = [*SMALL, "model.norm=batch", "train.iterations=1500", "train.checkpoint_every=5", "eval.every=20"]
    settings += ["eval.keep=best"]
    seconds = seconds_to_a_checkpoint(tmp_path / "undisturbed", tmp_path / "data", *settings)
    steps = kill_again_and_again(tmp_path / "killed", tmp_path / "data", 20, seconds, *settings)
    print("went on from steps", steps)
    assert steps == sorted(steps) and len(set(steps)) > 5  # it did make progress in between
    check_same(tmp_path / "killed", tmp_path / "undisturbed")
    bests = [(tmp_path / run / "checkpoints/best.json").read_text() for run in ("killed", "undisturbed")]
    assert bests[0] == bests[1]
    metrics = [json.loads((tmp_path / run / "eval/test/metrics.json").read_text()) for run in ("killed", "undisturbed")]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_two_replicas_under_xla_are_killed_without_trace_and_go_on_as_one(tmp_path):
    settings = [*SMALL, "train.iterations=60", "train.checkpoint_every=5", "eval.every=0", "train.jit_compile=true"]
    two = ["strategy.kind=mirrored", "strategy.replicas=2"]
    finish(tmp_path / "undisturbed", tmp_path / "data", *settings, *two)
    process, output = start(tmp_path / "killed", tmp_path / "data", *settings, *two)
    while not list((tmp_path / "killed/checkpoints").glob("step-5.index")):
        assert process.poll() is None, output.read_text()[-3000:]
        time.sleep(0.02)
    process.kill()
    process.wait()
    finish(tmp_path / "killed", tmp_path / "data", *settings, *two)
    check_same(tmp_path / "killed", tmp_path / "undisturbed")
    longer = [*settings, "train.iterations=65"]
    finish(tmp_path / "killed", tmp_path / "data", *longer)  # on one replica
    assert state(tmp_path / "killed")["step/.ATTRIBUTES/VARIABLE_VALUE"] == 65


def free_addresses(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


@pytest.mark.slow
def test_two_workers_train_as_one_process_and_survive_the_loss_of_one(tmp_path):
    """With SGD at the paper's rate, for as many steps as rounding errors take to grow a hundredfold.

    AdamW divides by the size of gradients and so makes as much of rounding errors as of gradients; and a training from
    random weights is chaotic in the long run: at this rate differences of 1e-7 are 1e-3 after 50 steps.
    """
    settings = [*SMALL, "train.iterations=30", "train.checkpoint_every=10", "eval.every=15"]
    settings += ["train.optimizer=sgd", "train.learning_rate=0.01", "train.reference_batch=null"]
    finish(tmp_path / "one", tmp_path / "data", *settings)
    workdir = tmp_path / "two"

    def start_both():
        addresses = free_addresses(2)
        return [
            start(workdir, tmp_path / "data", *settings, "strategy.kind=workers", worker=i, addresses=addresses)
            for i in range(2)
        ]

    (chief, told), (other, _) = start_both()
    while not list((workdir / "checkpoints").glob("step-10.index")):
        assert chief.poll() is None and other.poll() is None, told.read_text()[-3000:]
        time.sleep(0.02)
    other.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert chief.wait(timeout=1200) == 2, told.read_text()[-3000:]
    print(
        f"the other worker stopped after {time.monotonic() - killed:.1f} s:", told.read_text().strip().splitlines()[-1]
    )
    assert "Another worker was lost at step" in told.read_text()
    both = start_both()
    for process, output in both:
        assert process.wait() == 0, output.read_text()[-3000:]
    assert "Resuming from step" in both[0][1].read_text()
    check_same(workdir, tmp_path / "one", atol=1e-5)
