"""Which training images share a canvas, and which of them share a step. NumPy only.

A bucket is a set of images padded to the same size, their canvas: one static shape for XLA. The canvas is the smallest
that holds all images of the bucket, and the images are divided into buckets so that the total number of canvas pixels
is as small as possible.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# The last batch of a bucket is filled with further images of that bucket. With buckets of at least this many images, at
# the paper's 16 images per step, no image is seen more than a quarter more often than it should; this project's choice.
SMALLEST = 64


def divide(
    fitted: npt.ArrayLike, portrait: npt.ArrayLike, count: int, smallest: int = SMALLEST
) -> tuple[npt.NDArray, npt.NDArray]:
    """Divide images among at most `count` canvases; fewer if another one would save nothing.

    One canvas serves all images. With two or more, landscape and portrait images are separated, as in Detectron's
    batches; then, as long as there are fewer than `count` buckets, the bucket whose best split saves most is split. For
    three canvases this is the optimum among divisions that separate the orientations.

    Args:
        fitted: int [N, 2]. Height and width of the smallest canvas of each image.
        portrait: bool [N]. Whether each image is higher than wide.
        count: int. Largest number of canvases.
        smallest: int. Smallest number of images in a bucket that results from a split.

    Returns:
        canvases, int32 [C, 2], heights and widths; bucket, int64 [N], the index of each image's canvas.
    """
    fitted = np.asarray(fitted, np.int64)
    bucket = (
        np.unique(np.asarray(portrait), return_inverse=True)[1].reshape(-1)
        if count > 1
        else np.zeros_like(fitted[:, 0])
    )
    canvases = [fitted[bucket == b].max(axis=0) for b in np.unique(bucket)]
    while len(canvases) < count:
        best: tuple = (0, None)
        for b, canvas in enumerate(canvases):
            members = np.flatnonzero(bucket == b)
            second = split(fitted[members], smallest)
            if second is not None:
                parts = members[~second], members[second]
                saved = len(members) * canvas.prod() - sum(_pixels(fitted[part]) for part in parts)
                best = max(best, (saved, parts), key=lambda candidate: candidate[0])
        if best[1] is None:
            break
        first, second = best[1]
        bucket[second] = len(canvases)
        canvases[bucket[first[0]]] = fitted[first].max(axis=0)
        canvases.append(fitted[second].max(axis=0))
    return np.array(canvases, np.int32).reshape(-1, 2), bucket


def split(fitted: npt.NDArray, smallest: int = 1) -> npt.NDArray | None:
    """Divide images between two canvases so that the total number of pixels is smallest.

    Of any two canvases that hold all images, one is as high as the highest image and one as wide as the widest. Either
    these are the same canvas, and the other is smaller in both directions, or one is high and narrow and the other low
    and wide. So only the heights and widths that occur have to be tried: 42 each at the paper's 1333 pixels.

    Args:
        fitted: int [N, 2]. Height and width of the smallest canvas of each image.
        smallest: int. Smallest number of images on each canvas; images that fit both get the smaller canvas.

    Returns:
        bool [N], which images get the second canvas; None if no split needs fewer pixels than one canvas for all.
    """
    heights, row = np.unique(fitted[:, 0], return_inverse=True)
    widths, column = np.unique(fitted[:, 1], return_inverse=True)
    shape = len(heights), len(widths)
    total = np.bincount(row.reshape(-1) * shape[1] + column.reshape(-1), minlength=shape[0] * shape[1]).reshape(shape)
    within = total.cumsum(axis=0).cumsum(axis=1)  # [h, w], images no higher and no wider
    low, narrow, everything = within[:, -1:], within[-1:], within[-1, -1]
    wide_pixels, high_pixels = heights[:, None] * widths[-1], heights[-1] * widths[None]

    # The second canvas is low and narrow, the first holds the rest.
    nested = within * heights[:, None] * widths + (everything - within) * heights[-1] * widths[-1]
    nested = _where_possible(nested, within, everything, smallest)
    # The second canvas is low and wide, the first high and narrow; images that fit both get the smaller one.
    wide_is_smaller = wide_pixels <= high_pixels
    crossed = (low - within) * wide_pixels + (narrow - within) * high_pixels
    crossed = crossed + within * np.minimum(wide_pixels, high_pixels)
    of_wide = low - np.where(wide_is_smaller, 0, within)
    crossed = _where_possible(crossed, of_wide, everything, smallest)
    crossed = np.where(low + narrow - within == everything, crossed, _NEVER)

    form, i, j = np.unravel_index(np.argmin([nested, crossed]), (2, *shape))
    if (nested, crossed)[form][i, j] >= everything * heights[-1] * widths[-1]:
        return None
    is_low, is_narrow = fitted[:, 0] <= heights[i], fitted[:, 1] <= widths[j]
    if form == 0:
        return is_low & is_narrow
    return is_low & (wide_is_smaller[i, j] | ~is_narrow)


_NEVER = np.iinfo(np.int64).max


def _where_possible(pixels: npt.NDArray, images: npt.NDArray, everything: int, smallest: int) -> npt.NDArray:
    return np.where((images >= smallest) & (everything - images >= smallest), pixels, _NEVER)


def _pixels(fitted: npt.NDArray) -> int:
    """Pixels of the smallest common canvas of some images, times the number of images."""
    return len(fitted) * fitted.max(axis=0).prod()


class TrainingOrder:
    """Which images each step sees: a function of the step alone, so that a resumed run continues with the same images.

    Each epoch is a new shuffle. Each batch holds images of one bucket, and the last batch of a bucket is filled from a
    further shuffle, so that every image is seen at least once per epoch.

    Args:
        bucket: int [N]. The bucket of each image.
        batch_size: int. Images per step, over all devices.
        seed: int. Seed of the shuffles.
    """

    def __init__(self, bucket: npt.NDArray, batch_size: int, seed: int) -> None:
        self.groups = [np.flatnonzero(bucket == b) for b in np.unique(bucket)]
        self.batch_size, self.seed = batch_size, seed
        self.batches = [-(-len(group) // batch_size) for group in self.groups]
        self.steps_per_epoch = sum(self.batches)
        self._cached: tuple = (None, None)

    def epoch(self, number: int) -> npt.NDArray:
        """The indices of an epoch's images, int64 [steps_per_epoch, batch_size]; epochs are counted from 0."""
        if self._cached[0] != number:
            rng = np.random.default_rng([self.seed, number])
            rows = []
            for group, batches in zip(self.groups, self.batches, strict=True):
                shuffled = rng.permutation(group)
                while len(shuffled) < batches * self.batch_size:
                    shuffled = np.concatenate([shuffled, rng.permutation(group)])
                rows.append(shuffled[: batches * self.batch_size].reshape(batches, self.batch_size))
            self._cached = (number, rng.permutation(np.concatenate(rows)))
        return self._cached[1]

    def batch(self, step: int) -> npt.NDArray:
        """The indices of a step's images, int64 [batch_size]; steps are counted from 0."""
        return self.epoch(step // self.steps_per_epoch)[step % self.steps_per_epoch]
