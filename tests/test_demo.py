"""The trainings that docs/results.md reports, from its commands; minutes each: `make test-slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from retinanet_keras.evaluation.coco_metrics import METRICS
from retinanet_keras.training.resume import load_run

RESULTS = "eval/test/results.json"
ROOT = Path(__file__).parents[1]
BCCD = ROOT.parent / "shared" / "data" / "bccd"


def train(name, workdir, data_dir):
    """The metrics of a configuration trained as written."""
    command = [sys.executable, "train.py", "--config", f"configs/{name}.json", "--workdir", str(workdir)]
    subprocess.run([*command, "--set", f"data.dir={data_dir}"], cwd=ROOT, check=True)
    return json.loads((workdir / "eval/test/metrics.json").read_text())


@pytest.mark.slow
def test_shapes(tmp_path):
    assert train("shapes", tmp_path / "run", tmp_path / "data")["AP"] >= 0.5


@pytest.mark.slow
@pytest.mark.skipif(not BCCD.exists(), reason=f"needs the blood cell images in {BCCD}")
def test_bccd(tmp_path):
    run = tmp_path / "run"
    metrics = train("bccd", run, BCCD)
    assert metrics["AP50"] >= 0.8 and metrics["AP"] >= 0.48
    load_run(run)[1].save(run / "model.keras")
    for given in (["--export", run / "export"], ["--weights", run / "model.keras"], ["--results", run / RESULTS]):
        subprocess.run([sys.executable, "evaluate.py", "--workdir", run, *given], cwd=ROOT, check=True)
        found = json.loads((run / f"eval/test-{given[1].name}/metrics.json").read_text())
        assert [found[name] for name in METRICS] == pytest.approx([metrics[name] for name in METRICS], abs=5e-4)
