"""The types of tensors and sizes in annotations, and arithmetic on sizes."""

from typing import Any, TypeAlias

from keras import ops

Tensor: TypeAlias = Any  # of any backend of Keras; what takes one also takes a NumPy array
Size: TypeAlias = Any  # an int, or an integer scalar of the graph where a size is not known before the graph runs


def round_up(size: Size, multiple: int) -> Size:
    """Round a size, or an array of sizes, up to the next multiple; an int stays an int, as XLA needs it."""
    return (size + multiple - 1) // multiple * multiple  # not -(-size // multiple): ONNX rounds negative quotients up


def smaller(a: Size, b: Size) -> Size:
    """The smaller of two sizes: of ints an int, as XLA needs it; else a scalar of the graph."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else ops.minimum(a, b)
