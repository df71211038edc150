"""The identity of metrics: equal weights and settings have the same one, and metrics.json of a run carries it."""

import json

import pytest

from retinanet_keras.cli.evaluate import evaluate
from retinanet_keras.config import DetectionConfig, config_from_dict
from retinanet_keras.evaluation.identity import identity
from retinanet_keras.training.resume import load_trained

pytestmark = pytest.mark.eager


def test_equal_weights_and_settings_are_told_from_others(small_model):
    config = config_from_dict({})
    one, same, other = small_model(), small_model(), small_model(seed=1)
    assert identity(one, config) == identity(same, config) == json.loads(json.dumps(identity(one, config)))
    assert identity(one, config)["weights"] != identity(other, config)["weights"]
    strict = small_model(detection=DetectionConfig(nms_iou=0.3))
    assert identity(strict, config)["weights"] == identity(one, config)["weights"]
    changed = (identity(strict, config), identity(one, config_from_dict({"data": {"short_side": 600}})))
    changed += (identity(one, config, "val"), identity(small_model(dtype="mixed_bfloat16"), config))
    assert all(known["settings"] != identity(one, config)["settings"] for known in changed)


def test_the_metrics_of_a_run_carry_its_identity(finished):
    config, model, step = load_trained(finished[0].path)
    metrics = json.loads((finished[0].evaluation("val") / "metrics.json").read_text())
    assert step == json.loads(finished[0].best_file.read_text())["step"]
    assert {key: metrics[key] for key in ("step", "weights", "settings")} == {
        "step": step, **identity(model, config, "val")
    }  # fmt: skip


def test_an_evaluation_says_whose_weights_and_settings_it_used(finished, tmp_path):
    config, model, _ = load_trained(finished[0].path)
    model.save_weights(tmp_path / "other.weights.h5")
    (tmp_path / "config.json").write_text(finished[0].config_file.read_text())
    metrics = evaluate(
        tmp_path / "config.json", workdir=tmp_path, split="val", weights=tmp_path / "other.weights.h5",
        overrides=["detection.nms_iou=0.3", "data.short_side=48"],
    )  # fmt: skip
    known = identity(model, config, "val")
    assert metrics["weights"] == known["weights"] and metrics["step"] is None
    assert metrics["settings"] == known["settings"] | {"detection.nms_iou": 0.3, "data.short_side": 48}
