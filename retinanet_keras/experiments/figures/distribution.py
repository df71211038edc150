"""Figure 4: how much of the loss is in how few examples (§5.1, Analysis of the Focal Loss).

The paper samples the probabilities that a converged model predicts for some 10^7 negative and 10^5 positive windows of
random images, computes FL for several gamma, normalizes each to a sum of 1, and plots the cumulative distribution from
the lowest loss to the highest. It does not define a window; here it is a term of the training's classification loss, of
which each anchor has K, one for each class. A positive has target 1: one term of each positive anchor, that of its
class. A negative has target 0: the K terms of each background anchor, and the K - 1 terms of the other classes of each
positive one. Ignored anchors have none. The FL of all terms sums to what training divides by its normalizer. Mining is
not applied, even where the run was trained with it.

FL decreases with x_t for every gamma, so that the order by x_t holds for all of them: terms are counted and summed in
fine bins of x_t. Memory does not grow with the number of terms, all count, and sums at the edges of bins are exact.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tqdm import tqdm

from retinanet_keras import targets
from retinanet_keras.anchors import anchor_boxes
from retinanet_keras.config import Config, load_config
from retinanet_keras.data import dataset_formats, inference_batches
from retinanet_keras.data.coco import CocoDataset
from retinanet_keras.errors import UserError
from retinanet_keras.evaluation import detect
from retinanet_keras.experiments.figures import loss_curves, sheet
from retinanet_keras.model import RetinaNet
from retinanet_keras.storage import disk
from retinanet_keras.tensors import round_up
from retinanet_keras.training.resume import load_run
from retinanet_keras.training.run_folder import RunFolder, load_config_of

GAMMAS = (0.0, 0.5, 1.0, 2.0)
NEGATIVES, POSITIVES = 10**7, 10**5  # the paper's numbers of windows
LIMIT, PER_UNIT = 32, 2048  # bins: x_t from LIMIT down to -LIMIT, PER_UNIT of them per unit
CHUNK = 64  # random images sorted into batches by padded size at a time
EASY = 0.2, 0.01  # the hardest fractions reported, of positives and of negatives


class Terms:
    """Histogram of terms of the loss by x_t.

    Args:
        gammas: sequence of float. Values of gamma.

    Attributes:
        counts: int64 [bins]. Number of terms; x_t decreases, so the loss increases.
        sums: float64 [gammas, bins]. FL without alpha, a constant factor.
    """

    def __init__(self, gammas: Sequence[float] = GAMMAS):
        self.gammas = gammas
        self.counts: npt.NDArray[np.int64] = np.zeros(2 * LIMIT * PER_UNIT, np.int64)
        self.sums = np.zeros((len(gammas), len(self.counts)))

    def add(self, x_t: npt.NDArray[np.floating]) -> None:
        """Add terms; x_t: float [N]."""
        bins: npt.NDArray[np.int64] = np.clip((LIMIT - np.float64(x_t)) * PER_UNIT, 0, len(self.counts) - 1).astype(
            np.int64
        )
        self.counts += np.bincount(bins, minlength=len(self.counts))
        for total, gamma in zip(self.sums, self.gammas, strict=True):
            values = loss_curves.focal_of(gamma)(tf.constant(x_t), 1.0)
            total += np.bincount(bins, values.numpy(), len(self.counts))

    def shares(self, gamma: float, fractions: Any) -> Any:
        """Return the cumulative distribution: the fraction of the loss in the easiest `fractions` [N] of the terms."""
        total = self.sums[self.gammas.index(gamma)]
        at = np.concatenate([[0], np.cumsum(self.counts)]) / self.counts.sum()
        return np.interp(fractions, at, np.concatenate([[0], np.cumsum(total)]) / total.sum())

    def hardest(self, gamma: float, fraction: float) -> float:
        """Return the fraction of the loss in the hardest `fraction` of the terms."""
        return float(1 - self.shares(gamma, 1 - fraction))


def figure4(
    to: str | Path,
    run: str | Path,
    split: str | None = None,
    images: int | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Draw Figure 4 of a trained run, and print its findings next to the paper's.

    Args:
        to: str or Path. Folder to write to.
        run: str or Path. Folder of the run.
        split: str or None. Name of the split; None for the training split.
        images: int or None. Number of random images; None for as many as give the paper's numbers of windows, or all.
        overrides: sequence of str. Overrides of the run's configuration, such as "data.dir=D".

    Returns:
        The path of the picture.

    Raises:
        UserError: where there is no such run, or its images have no positive anchor.
    """
    folder = RunFolder(run)
    load_config_of(folder)  # reports a missing run
    config, model = load_run(run, load_config(folder.config_file, overrides))
    dataset = dataset_formats.open_split(config.data, split or config.data.train_split)
    detect.check_categories(dataset, folder.categories())
    positive, negative, seen = collect(model, dataset, config, images)
    if not positive.counts.any() or not negative.counts.any():
        raise UserError(f"{seen} images of {dataset.annotation_file} have no positive anchors; choose another --split")
    about = {
        "run": str(run),
        "split": split or config.data.train_split,
        "images": seen,
        "positives": int(positive.counts.sum()),
        "negatives": int(negative.counts.sum()),
    }
    findings = {
        name: {f"{gamma:g}": terms.hardest(gamma, fraction) for gamma in GAMMAS}
        for name, terms, fraction in (
            ("positive loss in the hardest 20%", positive, EASY[0]),
            ("negative loss in the hardest 1%", negative, EASY[1]),
        )
    }
    path = _draw(to, positive, negative, about)
    disk.write(Path(to, "figure4.json"), json.dumps({**about, **findings}, indent=1) + "\n")
    print(f"{Path(to, 'figure4.json')}\n\n{told(about, findings)}")
    return path


def collect(
    model: RetinaNet, dataset: CocoDataset, config: Config, images: int | None = None
) -> tuple[Terms, Terms, int]:
    """Return (Terms of the positives, Terms of the negatives, number of images); `images` as of `figure4`."""
    positive, negative = Terms(), Terms()
    order = np.random.default_rng(0).permutation(len(dataset))[:images]
    place = {int(image_id): i for i, image_id in enumerate(dataset.image_ids)}
    step = tf.function(lambda *batch: _terms(model, *batch), reduce_retracing=True, autograph=False)
    seen = 0
    with tqdm(total=len(order), desc="Sorting losses", unit="image", mininterval=1.0, leave=False) as bar:
        while seen < len(order):
            if images is None and positive.counts.sum() >= POSITIVES and negative.counts.sum() >= NEGATIVES:
                break
            chunk = dataset.subset(order[seen : seen + CHUNK])
            plan = inference_batches.inference_plan(chunk.sizes, config.eval.batch_size, config.data)
            for pixels, about in inference_batches.inference_batches(chunk, plan, config.data):
                own = [place[int(image_id)] for image_id in about["image_id"]]
                boxes: npt.NDArray = np.zeros((len(own), dataset.max_boxes, 4), np.float32)
                labels: npt.NDArray = np.full((len(own), dataset.max_boxes), -1, np.int32)
                for row, i in enumerate(own):
                    count = len(dataset.labels_of(i))
                    boxes[row, :count] = dataset.boxes_of(i) * about["scale"][row].numpy()
                    labels[row, :count] = dataset.labels_of(i)
                for terms, x_t in zip((positive, negative), step(pixels, about["size"], boxes, labels), strict=True):
                    terms.add(x_t.numpy())
                bar.update(len(own))
            seen += len(chunk)
    return positive, negative, seen


def _terms(
    model: RetinaNet, pixels: tf.Tensor, sizes: tf.Tensor, boxes: tf.Tensor, labels: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """x_t of the positive terms [P], and of the negative ones [N], of a batch."""
    height, width = (round_up(side, model.detection.pad_multiple) for side in tf.unstack(tf.shape(pixels)[1:3]))
    logits = model._outputs_in_graph(pixels, sizes)["logits"]  # [B, A, K]
    classes, _ = targets.assign(
        anchor_boxes(height, width, model.anchors), boxes, labels, **vars(model.targets)
    )  # [B, A]
    return x_t_of(logits, classes)


def x_t_of(logits: tf.Tensor, classes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return x_t of the terms of the loss with target 1, [P], and of those with target 0, [N].

    Args:
        logits: float [B, A, K].
        classes: int32 [B, A], as returned by `targets.assign`.
    """
    positive = tf.one_hot(classes, tf.shape(logits)[-1], True, False)  # [B, A, K]; BACKGROUND and IGNORE have no class
    counted = (classes != targets.IGNORE)[..., None]  # [B, A, 1]
    return tf.boolean_mask(logits, positive), -tf.boolean_mask(logits, counted & ~positive)


def told(about: dict[str, Any], findings: dict[str, dict[str, float]]) -> str:
    """Format the findings as text, next to the paper's words."""
    lines = ["{run}: {images:,} images of {split}, {positives:,} positives, {negatives:,} negatives".format(**about)]
    words = (
        '"approximately 20% of the hardest positive samples account for roughly half of the positive loss, as γ '
        'increases more of the loss gets concentrated in the top 20% of examples, but the effect is minor"',
        '"with γ = 2 (our default setting), the vast majority of the loss comes from a small fraction of samples"',
    )
    for (name, shares), said in zip(findings.items(), words, strict=True):
        numbers = ", ".join(f"γ = {gamma}: {100 * share:.1f}%" for gamma, share in shares.items())
        lines.append(f"{name}: {numbers}\n    the paper (§5.1): {said}")
    return "\n".join(lines)


def _draw(to: str | Path, positive: Terms, negative: Terms, about: dict[str, Any]) -> Path:
    figure, axes = sheet.panels(3, (13, 4.4))
    near = np.geomspace(1e-6, 1, 601)  # the hardest fractions, for the last panel
    fractions = np.unique(np.concatenate([np.linspace(0, 1, 1001), 1 - near]))
    looks = list(zip(GAMMAS, (sheet.BLUE, sheet.ORANGE, sheet.GREEN, sheet.PINK), ("-", "--", "-.", "-"), strict=True))
    table, columns = [fractions], ["easiest fraction"]
    for axis, terms, kind in ((axes[0], positive, "positive"), (axes[1], negative, "negative")):
        for gamma, color, dash in looks:
            shares = terms.shares(gamma, fractions)
            axis.plot(fractions, shares, color=color, linestyle=dash, linewidth=1.8, label=f"γ = {gamma:g}")
            table.append(shares)
            columns.append(f"{kind} gamma={gamma:g}")
        axis.set(xlim=(0, 1.01), ylim=(0, 1.01), xlabel=f"fraction of {kind} examples", ylabel="share of their loss")
        axis.set_title(f"{about[kind + 's']:,} {kind}s, the lowest loss first", loc="left", fontsize=10)
        sheet.legend(axis, loc="upper left")
    for gamma, color, dash in looks:
        share = 1 - negative.shares(gamma, 1 - near)
        axes[2].plot(near, share, color=color, linestyle=dash, linewidth=1.8, label=f"γ = {gamma:g}")
    axes[2].axvline(EASY[1], color=sheet.GRAY, linewidth=0.8)
    axes[2].text(EASY[1] * 1.2, 0.02, "hardest 1%", color=sheet.GRAY, fontsize=9)
    axes[2].set(xscale="log", xlim=(1e-6, 1), ylim=(0, 1.01))
    axes[2].set(xlabel="hardest fraction of negative examples", ylabel="share of their loss")
    axes[2].set_title("the same negatives, the highest loss first", loc="left", fontsize=10)
    sheet.legend(axes[2], loc="upper left")
    return sheet.save(to, "figure4", figure, columns, np.stack(table, axis=1))
