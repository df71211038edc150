"""Two processes on one run's folder at once: both do what they were asked to, or one is refused and says why."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from PIL import Image

from retinanet_keras.evaluation.coco_metrics import METRICS
from retinanet_keras.serving import export
from retinanet_keras.training import best
from retinanet_keras.training.resume import Checkpoints, load_run
from retinanet_keras.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
COMMANDS = ("train", "evaluate", "export", "detect", "inspect")


def command(name, folder):
    if name == "train":  # two steps more
        more = ["--set", "train.iterations=8"]
        return ["train.py", "--config", str(folder / "config.json"), "--workdir", str(folder), *more]
    if name == "evaluate":
        return ["evaluate.py", "--workdir", str(folder), "--split", "val"]
    to = str(folder.parent / name)
    if name == "export":
        return ["-m", "retinanet_keras", name, "--workdir", str(folder), "--to", to, "--onnx", f"{to}.onnx"]
    if name == "detect":
        return ["-m", "retinanet_keras", name, "--model", str(folder), str(ROOT / "docs/images/shapes.jpg"), "--to", to]
    return ["-m", "retinanet_keras", name, "--config", str(folder / "config.json"), "--to", to]


@pytest.mark.slow
@pytest.mark.parametrize("pair", [*itertools.combinations_with_replacement(COMMANDS, 2)])
def test_both_are_right_or_one_is_refused(finished, tmp_path, pair):
    shutil.copytree(finished[0].path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    started = [
        subprocess.Popen([sys.executable, *command(name, folder.path)], cwd=ROOT, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for name in pair
    ]  # fmt: skip
    done = [(name, process.communicate(timeout=1200)[0], process.returncode)
            for name, process in zip(pair, started, strict=True)]  # fmt: skip
    refused = [said for _, said, status in done if status]
    assert all(status in (0, 2) for _, _, status in done) and len(refused) < 2, done
    assert all("is in use: " in said for said in refused), refused
    worked = [name for name, _, status in done if not status]

    metrics = json.loads((folder.evaluation("val") / "metrics.json").read_text())
    assert set(METRICS) < set(metrics) and isinstance(
        json.loads((folder.evaluation("val") / "results.json").read_text()), list
    )
    assert not (folder.evaluation("val") / "unfinished.jsonl").exists()
    assert metrics["step"] in [int(row["step"]) for row in folder.log_rows()]
    _, model = load_run(folder.path)
    assert best.read(folder)["step"] in (3, 6, 8)
    assert Checkpoints(model, folder, 3).restore() == (8 if "train" in worked else 6)
    steps = [row["step"] for row in folder.log_rows() if "loss" in row]
    assert steps == ([2, 4, 6, 8] if "train" in worked else [2, 4, 6])
    assert export.versions(folder.export) == [1]
    assert len(export.versions(tmp_path / "export")) == worked.count("export")
    if "export" in worked:
        onnx.checker.check_model(onnx.load(tmp_path / "export.onnx"))
    if "detect" in worked:
        Image.open(tmp_path / "detect/shapes.jpg.png").load()
    if "inspect" in worked:
        assert json.loads((tmp_path / "inspect/report.json").read_text())["errors"] == []
