"""Figure 4: how much of the loss is in how few examples (§5.1, Analysis of the Focal Loss).

The paper samples the probabilities that a converged model predicts for some 10^7 negative and 10^5 positive windows of
random images, takes FL of them for several gamma, makes each sum to 1, and plots its cumulative distribution, from the
lowest loss to the highest. What a window is it leaves open; here it is a term of the training's classification loss,
of which each anchor has K, one for each class. A positive has target 1: one term of each positive anchor, of its own
class. A negative has target 0: the K terms of each background anchor, and the K - 1 of the other classes of each
positive one. Ignored anchors have none. The FL of all terms sums to what training divides by its normalizer. Mining
plays no part, even where the run was trained with it.

FL falls with x_t whatever gamma is, so that one order, by x_t, serves all of them: terms are counted and summed in fine
bins of x_t. Memory does not grow with their number, all are counted, and sums at the bins' borders are exact.
"""

import json
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from retinanet_keras import targets
from retinanet_keras.anchors import anchor_boxes
from retinanet_keras.config import load_config
from retinanet_keras.data import dataset_formats, inference_batches
from retinanet_keras.errors import UserError
from retinanet_keras.evaluation import detect
from retinanet_keras.experiments.figures import loss_curves, sheet
from retinanet_keras.storage import disk
from retinanet_keras.tensors import round_up
from retinanet_keras.training.resume import load_run
from retinanet_keras.training.run_folder import RunFolder, load_config_of

GAMMAS = (0.0, 0.5, 1.0, 2.0)
NEGATIVES, POSITIVES = 10**7, 10**5  # the paper's numbers of windows
LIMIT, PER_UNIT = 32, 2048  # bins: x_t from LIMIT down to -LIMIT, and how many to 1
CHUNK = 64  # random images whose canvases are sorted into batches at a time
EASY = 0.2, 0.01  # the hardest fractions that are told, of positives and of negatives


class Terms:
    """Terms of the loss by x_t, as many as come.

    Attributes:
        counts: int64 [bins], x_t falling, so that the loss rises.
        sums: float64 [gammas, bins], of FL without alpha, which is one factor for all.
    """

    def __init__(self, gammas=GAMMAS):
        self.gammas = gammas
        self.counts = np.zeros(2 * LIMIT * PER_UNIT, np.int64)
        self.sums = np.zeros((len(gammas), len(self.counts)))

    def add(self, x_t):
        """Count terms in; x_t: float [N]."""
        places = np.clip((LIMIT - np.float64(x_t)) * PER_UNIT, 0, len(self.counts) - 1).astype(np.int64)
        self.counts += np.bincount(places, minlength=len(self.counts))
        for total, gamma in zip(self.sums, self.gammas, strict=True):
            values = loss_curves.focal_of(gamma)(tf.constant(x_t), 1.0)
            total += np.bincount(places, values.numpy(), len(self.counts))

    def shares(self, gamma, fractions):
        """The cumulative distribution: the share of all loss that is in the easiest `fractions` [N] of the terms."""
        total = self.sums[self.gammas.index(gamma)]
        known = np.concatenate([[0], np.cumsum(self.counts)]) / self.counts.sum()
        return np.interp(fractions, known, np.concatenate([[0], np.cumsum(total)]) / total.sum())

    def hardest(self, gamma, fraction):
        """The share of all loss that is in the hardest `fraction` of the terms."""
        return float(1 - self.shares(gamma, 1 - fraction))


def figure4(to, run, split=None, images=None, overrides=()):
    """Figure 4 of a trained run, and its findings beside the paper's words.

    Args:
        run: the run's folder.
        split: None: the one it was trained on.
        images: how many, at random; None: until there are the paper's numbers of windows, or no more images.
        overrides: of the run's configuration, such as "data.dir=D".

    Returns:
        the picture's path.

    Raises:
        UserError: where there is no such run, or its images have no positive anchor.
    """
    folder = RunFolder(run)
    load_config_of(folder)  # says that there is no run
    config, model = load_run(run, load_config(folder.config_file, overrides))
    dataset = dataset_formats.open_split(config.data, split or config.data.train_split)
    detect.check_categories(dataset, folder.categories())
    positive, negative, seen = collect(model, dataset, config, images)
    if not positive.counts.any() or not negative.counts.any():
        raise UserError(f"{seen} images of {dataset.annotation_file} have no positive anchors; choose another --split")
    about = {
        "run": str(run), "split": split or config.data.train_split, "images": seen,
        "positives": int(positive.counts.sum()), "negatives": int(negative.counts.sum()),
    }  # fmt: skip
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


def collect(model, dataset, config, images=None):
    """(Terms of the positives, Terms of the negatives, number of images) of random images; args as of `figure4`."""
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
                boxes = np.zeros((len(own), dataset.max_boxes, 4), np.float32)
                labels = np.full((len(own), dataset.max_boxes), -1, np.int32)
                for row, i in enumerate(own):
                    count = len(dataset.labels_of(i))
                    boxes[row, :count] = dataset.boxes_of(i) * about["scale"][row].numpy()
                    labels[row, :count] = dataset.labels_of(i)
                for terms, x_t in zip((positive, negative), step(pixels, about["size"], boxes, labels), strict=True):
                    terms.add(x_t.numpy())
                bar.update(len(own))
            seen += len(chunk)
    return positive, negative, seen


def _terms(model, pixels, sizes, boxes, labels):
    """x_t of the positive terms [P], and of the negative ones [N], of a batch."""
    height, width = (round_up(side, model.detection.pad_multiple) for side in tf.unstack(tf.shape(pixels)[1:3]))
    logits = model._outputs_in_graph(pixels, sizes)["logits"]  # [B, A, K]
    classes, _ = targets.assign(
        anchor_boxes(height, width, model.anchors), boxes, labels, **vars(model.targets)
    )  # [B, A]
    return x_t_of(logits, classes)


def x_t_of(logits, classes):
    """x_t of the terms of the loss with target 1, [P], and of those with target 0, [N].

    Args:
        logits: [B, A, K].
        classes: int32 [B, A], as `targets.assign` gives them.
    """
    own = tf.one_hot(classes, tf.shape(logits)[-1], True, False)  # [B, A, K]; BACKGROUND and IGNORE have no class
    counted = (classes != targets.IGNORE)[..., None]  # [B, A, 1]
    return tf.boolean_mask(logits, own), -tf.boolean_mask(logits, counted & ~own)


def told(about, findings):
    """The findings as text, beside the paper's words."""
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


def _draw(to, positive, negative, about):
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
