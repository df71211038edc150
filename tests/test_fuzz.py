"""Damaged images never end the process: each gives detections or INVALID_ARGUMENT. The damage is in `fuzz`."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fuzz
import pytest

from retinanet_keras.serving import export


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_images_are_detections_or_an_invalid_argument(tiny_export, tmp_path, count):
    script = Path(fuzz.__file__)
    command = [sys.executable, str(script), str(export.find(tiny_export)), str(count), "1", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    last = (tmp_path / "input").read_bytes().hex() if (tmp_path / "input").exists() else "none"
    assert done.returncode == 0, f"status {done.returncode} at the input {last[:4000]}\n{done.stderr[-2000:]}"
    report = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(report))
    outcomes = report["outcomes"]
    assert not report["faults"]
    undamaged = sum(map(len, fuzz.ORIGINALS.values()))
    assert outcomes["undamaged: detections"] == undamaged
    assert outcomes["detections"] + outcomes["refused"] == count
    assert min(outcomes["detections"], outcomes["refused"]) > count / 10  # else it would be a test of one of them
    assert report["hungriest"][0] < 650, report["hungriest"]  # MB; a progressive JPEG of `serving.max_pixels` takes 576


def test_damage_is_the_same_each_time_and_of_every_kind():
    first, again = ([fuzz.mutated(number, 1) for number in range(500)] for _ in range(2))
    assert first == again and first != [fuzz.mutated(number, 2) for number in range(500)]
    kinds = Counter(name for name, _ in first)
    assert set(kinds) == {f"{kind} {way.__name__}" for kind in fuzz.FORMATS for way in fuzz.MUTATIONS}
    originals = {file for files in fuzz.ORIGINALS.values() for file in files}
    assert sum(data in originals for _, data in first) < 10 and len({data for _, data in first}) > 450
