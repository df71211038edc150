"""The picture of a training log."""

import numpy as np
import pytest
from PIL import Image

from retinanet_keras.visualization import training_curves
from retinanet_keras.visualization.draw import PALETTE


def log(steps, **columns):
    return [
        {"step": str(s), "loss": 2 / s, "classification_loss": str(1.2 / s), "box_loss": 0.8 / s, "learning_rate": 0.01}
        | columns
        for s in steps
    ]


@pytest.mark.parametrize(
    "rows",
    [
        log(range(1, 400)),
        log([20]),
        [],
        log([1, 2], AP="") + log([3], AP="0.25") + log([2], AP=0.5),  # resumed at 2
        [{"step": "1", "loss": "", "box_loss": None}, {"loss": 3}, {"step": "x"}, {"step": 5, "loss": "nan"}],
        log([1, 2], box_loss=0, learning_rate=0),
        log([1, 2], AP=0),
    ],
)
@pytest.mark.filterwarnings("error")
def test_training_curves(rows, tmp_path):
    path = tmp_path / "new" / "curves.png"
    training_curves.training_curves(rows, path)
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert min(picture.shape[:2]) > 400 and (picture < 128).any() and (picture == 255).all(-1).mean() > 0.5
    box = (np.abs(picture.astype(int) - PALETTE[0]).max(-1) < 8).any()
    assert box == any("step" in r and training_curves._number(r.get("box_loss")) > 0 for r in rows)


def test_ap_adds_a_panel(tmp_path):
    green = []
    for rows in (log([1, 2]), log([1, 2], AP=0.4)):
        training_curves.training_curves(rows, tmp_path / "curves.png")
        picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
        green.append((np.abs(picture - PALETTE[2]).max(-1) < 8).any())
    assert green == [False, True]


def test_smoothing_is_a_mean():
    assert training_curves._smooth(np.array([1.0, 2, 6, 3]), 1) == pytest.approx([1.5, 3, 11 / 3, 4.5])
    assert training_curves._smooth(np.array([4.0]), 3) == pytest.approx([4.0])
