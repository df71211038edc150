"""Which training images share a canvas, and which a step. NumPy only.

A bucket is a set of images with one canvas: one static shape for XLA. The canvas is the smallest that holds them all,
and the images are divided so that the canvases' pixels, summed over the images, are as few as possible.
"""

import numpy as np

# A bucket fills its last batch with further images of its own. A split leaves each part at least so many that, at the
# paper's 16 images a step, none of them comes more than a quarter more often than it should; this project's choice.
SMALLEST = 64


def divide(fitted, portrait, count, smallest=SMALLEST):
    """Divide images among at most `count` canvases; fewer where another would save nothing.

    One canvas serves all. Two or more: landscape and portrait apart, as in Detectron's batches, and then, while there
    are fewer than `count`, the bucket whose best split saves most is split. For three that is the best there is with
    the orientations apart.

    Args:
        fitted: int [N, 2], height and width of the smallest canvas of each image.
        portrait: bool [N].

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
        best = (0, None)
        for b, canvas in enumerate(canvases):
            members = np.flatnonzero(bucket == b)
            second = split(fitted[members], smallest)
            if second is not None:
                parts = members[~second], members[second]
                saved = len(members) * canvas.prod() - sum(_pixels(fitted[part]) for part in parts)
                best = max(best, (saved, parts), key=lambda found: found[0])
        if best[1] is None:
            break
        first, second = best[1]
        bucket[second] = len(canvases)
        canvases[bucket[first[0]]] = fitted[first].max(axis=0)
        canvases.append(fitted[second].max(axis=0))
    return np.array(canvases, np.int32).reshape(-1, 2), bucket


def split(fitted, smallest=1):
    """The division of images between two canvases that needs the fewest pixels.

    Of any two canvases that hold all images, one is as high as the highest image and one as wide as the widest. Either
    it is the same one, and the other is smaller both ways, or one is high and narrow and the other low and wide. So the
    heights and widths that occur are all there is to search: 42 each at the paper's 1333 pixels.

    Args:
        fitted: int [N, 2], height and width of the smallest canvas of each image.
        smallest: how many images each part must have at least, where what fits both canvases has the smaller one.

    Returns:
        bool [N], which images have the second canvas; None where no split needs fewer pixels than one canvas for all.
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
    # The second canvas is low and wide, the first high and narrow; what fits both has the smaller one.
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


def _where_possible(pixels, images, everything, smallest):
    return np.where((images >= smallest) & (everything - images >= smallest), pixels, _NEVER)


def _pixels(fitted):
    """Pixels of one canvas for these images, times their number."""
    return len(fitted) * fitted.max(axis=0).prod()


class TrainingOrder:
    """Which images a step sees: a pure function of the step, so that a resumed run sees what it would have seen.

    Each epoch is a new shuffle. Batches hold images of one bucket, and the last of each bucket is filled from a
    further shuffle, so that every image comes at least once.
    """

    def __init__(self, bucket, batch_size, seed):
        """bucket: int [N], each image's; batch_size: images of a step, over all devices."""
        self.groups = [np.flatnonzero(bucket == b) for b in np.unique(bucket)]
        self.batch_size, self.seed = batch_size, seed
        self.batches = [-(-len(group) // batch_size) for group in self.groups]
        self.steps_per_epoch = sum(self.batches)
        self._cached = (None, None)

    def epoch(self, number):
        """int64 [steps_per_epoch, batch_size], the indices of the epoch's images."""
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

    def batch(self, step):
        """int64 [batch_size], the indices of the images of a step, counted from 0."""
        return self.epoch(step // self.steps_per_epoch)[step % self.steps_per_epoch]
