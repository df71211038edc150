"""What the process is set up with before TensorFlow is imported, and that the user's own settings win."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from retinanet_keras import runtime

ROOT = Path(__file__).parents[1]
OURS = (runtime.SWITCH, runtime.CHOSEN, runtime.KERNELS, runtime.LOG_LEVEL, *runtime.THREADS, *runtime.MEMORY)


@pytest.fixture
def environment(monkeypatch):
    """No variable that matters here is set, the C library is left alone, and TensorFlow is not imported."""
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(runtime, "cpu_limit", lambda: None)
    monkeypatch.setattr(runtime, "cpu_flags", lambda: {"avx2", "fma"})
    monkeypatch.setattr(runtime, "_warned", set())
    return monkeypatch


def run(code, **variables):
    """What a new process prints as JSON, with none of the variables set but these."""
    env = {name: value for name, value in os.environ.items() if name not in OURS} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("flags", "work", "kernels"),
    [
        ({"avx2"}, None, None),
        ({"avx2"}, runtime.OTHER, "1"),
        ({"avx2"}, runtime.LARGE_TRAINING, "0"),
        ({"avx2", "avx512f", "avx512_vnni"}, runtime.OTHER, None),
        ({"avx2", "avx512f", "avx512_vnni"}, runtime.LARGE_TRAINING, None),
        (set(), runtime.OTHER, None),  # no x86 processor, or not Linux
    ],
)
def test_kernels_by_processor_and_work(environment, flags, work, kernels):
    environment.setattr(runtime, "cpu_flags", lambda: flags)
    runtime.set_up(work)
    assert os.environ.get(runtime.KERNELS) == kernels


def test_a_command_chooses_again_and_the_user_wins(environment):
    runtime.set_up()
    assert runtime.KERNELS not in os.environ
    runtime.set_up(runtime.OTHER)
    runtime.set_up(runtime.LARGE_TRAINING)
    assert os.environ[runtime.KERNELS] == "0"
    runtime.set_up()
    assert runtime.KERNELS not in os.environ

    environment.setenv(runtime.KERNELS, "1")
    environment.setenv(runtime.LOG_LEVEL, "0")
    runtime.set_up(runtime.LARGE_TRAINING)
    assert (os.environ[runtime.KERNELS], os.environ[runtime.LOG_LEVEL]) == ("1", "0")


def test_what_a_parent_process_chose_is_no_choice_of_the_users(environment):
    runtime.set_up(runtime.OTHER)
    code = (
        "import os, json; from retinanet_keras import runtime; runtime.cpu_flags = lambda: {'avx2'}; "
        "runtime.set_up(runtime.LARGE_TRAINING); print(json.dumps(os.environ.get(runtime.KERNELS)))"
    )
    inherited = {name: os.environ[name] for name in (runtime.KERNELS, runtime.CHOSEN)}
    assert inherited[runtime.KERNELS] == "1"
    assert run(code, **inherited) == "0"
    assert run(code, **{runtime.KERNELS: "1"}) == "1"


def test_off_leaves_the_process_as_it_is(environment):
    environment.setenv(runtime.SWITCH, "off")
    before = dict(os.environ)
    runtime.set_up(runtime.OTHER)
    assert dict(os.environ) == before


def test_off_takes_back_what_a_parent_process_chose(environment):
    runtime.set_up(runtime.OTHER)
    assert os.environ[runtime.KERNELS] == "1"
    environment.setenv(runtime.SWITCH, "off")
    runtime.set_up(runtime.OTHER)
    assert runtime.KERNELS not in os.environ and runtime.LOG_LEVEL not in os.environ


def test_importing_the_package_sets_up_and_does_not_import_tensorflow():
    code = (
        "import json, os, sys; import retinanet_keras; "
        "print(json.dumps([os.environ['TF_CPP_MIN_LOG_LEVEL'], 'tensorflow' in sys.modules]))"
    )
    assert run(code) == ["3", False]


def test_a_tensorflow_that_was_first_is_told_once_where_it_is_slower(environment, caplog):
    environment.setitem(sys.modules, "tensorflow", object())
    runtime.set_up(runtime.OTHER)
    assert runtime.KERNELS not in os.environ  # too late
    with caplog.at_level(logging.WARNING):
        runtime.tell_if_slow(runtime.LARGE_TRAINING)
        assert not caplog.records  # what TensorFlow chose is right for that
        runtime.tell_if_slow(runtime.OTHER)
        runtime.tell_if_slow(runtime.OTHER)
    assert len(caplog.records) == 1
    assert "TF_ENABLE_ONEDNN_OPTS=1, which has to be set before TensorFlow is imported" in caplog.text

    caplog.clear()
    environment.setattr(runtime, "_warned", set())
    environment.setenv(runtime.KERNELS, "0")  # as the user has it
    runtime.tell_if_slow(runtime.OTHER)
    assert not caplog.records


def test_work_is_known_by_the_network():
    assert runtime.work_of("resnet18") == runtime.work_of("resnet50", 32) == runtime.OTHER
    assert runtime.work_of("resnet50") == runtime.work_of("resnext101_32x8d", 64) == runtime.LARGE_TRAINING


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"user/job/cpu.max": "150000 100000\n", "user/cpu.max": "max 100000\n"}, 2),
        ({"user/job/cpu.max": "max 100000\n", "user/cpu.max": "250000 100000\n"}, 3),
        ({"user/other/cpu.max": "50000 100000\n"}, None),
        ({"cpu/batch/cpu.cfs_quota_us": "50000", "cpu/batch/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "10000000 100000\n"}, None),  # more than there are
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_the_limit_of_a_container(tmp_path, monkeypatch, files, limit):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text("4:cpu,cpuacct:/batch\n3:memory:/else\n0::/user/job\n")
    assert runtime.cpu_limit(tmp_path, tmp_path / "own") == limit
    if not any("user" in name or "batch" in name for name in files):
        assert runtime.cpu_limit(tmp_path, tmp_path / "absent") == limit


def test_threads_follow_the_limit(environment):
    environment.setattr(runtime, "cpu_limit", lambda: 3)
    environment.setenv(runtime.THREADS[1], "7")
    runtime.set_up()
    assert [os.environ[name] for name in runtime.THREADS] == ["3", "7"]


FAULTS = """
import ctypes, json, resource, retinanet_keras
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(48 << 20) for _ in range(2)]
    for block in blocks:
        libc.memset(block, 1, 48 << 20)
        libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(faults))
"""


@pytest.mark.skipif(runtime.platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_memory_is_kept_unless_the_user_says_otherwise():
    """Blocks above any size that glibc keeps by itself are mapped once, and not again at each use."""
    kept, plain = run(FAULTS), run(FAULTS, RETINANET_KERAS_RUNTIME="off")
    assert kept[0] > 10 and max(kept[2:]) < min(plain[2:]) / 5
    for own in ({"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}):
        assert min(run(FAULTS, **own)[2:]) > 5 * max(kept[2:])
