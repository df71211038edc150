"""How large an encoded image says it is, from its first bytes, in TensorFlow's graph: what would fill the memory is
refused before anything is decoded."""

import tensorflow as tf

START = 32  # bytes in which PNG, GIF, BMP and WebP say their size
OLD_BITMAP = 12  # bytes of a BMP's header that has sides of 16 bits, those of OS/2
MOST_BLOCKS = 20_000  # of a GIF: some 5 MB, looked through in a second or two


def checked(encoded, max_pixels):
    """The bytes, where the image they hold has at most so many pixels, those of all frames of a GIF counted.

    Args:
        encoded: string scalar, JPEG, PNG, GIF, BMP or WebP. No others: what TensorFlow could decode besides, now or in
            another release, has a size that is not known here.

    Raises, when run:
        InvalidArgumentError: the image is larger, its header is cut off, or its format is another.
    """
    found = pixels(encoded)
    known = insist(found >= 0, ["expected JPEG, PNG, GIF, BMP or WebP, the first bytes are of none"])
    fits = insist(found <= max_pixels, ["expected an image of at most", max_pixels, "pixels, its header says", found])
    with tf.control_dependencies([known, fits]):
        return tf.identity(encoded)


def insist(condition, words):
    """The operation that fails with `words` where a condition does not hold; in eager execution it does so at once.

    `tf.debugging.Assert` does the same within a `tf.cond`, which takes longer than all else here.
    """
    data = [tf.convert_to_tensor(word) for word in words]
    return tf.raw_ops.Assert(condition=condition, data=data, summarize=8)


def pixels(encoded):
    """How many pixels will be decoded, int64 scalar; -1 for a format that is not known."""
    return tf.cond(tf.io.is_jpeg(encoded), lambda: _jpeg(encoded), lambda: _of_others(encoded))  # the common one first


def _of_others(encoded):
    data = tf.io.decode_raw(encoded, tf.uint8, fixed_length=START)  # zeros where it is shorter
    data = tf.cast(tf.ensure_shape(data, [START]), tf.int64)

    def begins(text, at=0):
        return tf.reduce_all(data[at : at + len(text)] == list(text))

    return tf.case(
        [
            (begins(b"\x89PNG"), lambda: _big(data[16:20]) * _big(data[20:24])),
            (begins(b"GIF8"), lambda: _gif(encoded)),
            (begins(b"BM"), lambda: tf.reduce_prod(tf.abs(bitmap_sides(data)))),
            (begins(b"RIFF") & begins(b"WEBP", 8), lambda: _webp(data, begins)),
        ],
        default=lambda: tf.constant(-1, tf.int64),
    )


def _jpeg(encoded):
    return tf.reduce_prod(tf.image.extract_jpeg_shape(encoded, tf.int64)[:2])


def _webp(data, begins):
    """The three kinds of WebP: lossy and lossless have 14 bits a side, the extended format 24."""
    lossy = (little(data[26:28]) % 2**14) * (little(data[28:30]) % 2**14)
    packed = little(data[21:25])
    lossless = (packed % 2**14 + 1) * (packed // 2**14 % 2**14 + 1)
    extended = (little(data[24:27]) + 1) * (little(data[27:30]) + 1)
    return tf.where(begins(b"VP8X", 12), extended, tf.where(begins(b"VP8L", 12), lossless, lossy))


def _gif(encoded):
    """The pixels of all frames: TensorFlow's decoder holds them all, whatever the screen's size, to return the first.

    A walk over the blocks: header and colors, then extensions (0x21) and frames (0x2C), each followed by sub-blocks
    that begin with their length, up to one of length 0. One that does not end within MOST_BLOCKS has as many pixels as
    an int64 can tell.
    """
    data = tf.io.decode_raw(encoded, tf.uint8)
    end = tf.size(data)

    def at(place):
        return tf.cast(data[tf.minimum(place, end - 1)], tf.int64)

    def colors(flags):  # bytes of a table of colors
        return tf.where(flags >= 128, 3 * tf.bitwise.left_shift(tf.constant(2, tf.int64), flags % 8), 0)

    def step(place, inside, total):
        kind = at(place)
        side = [at(place + 5 + 2 * i) + 256 * at(place + 6 + 2 * i) for i in (0, 1)]
        frame, extension = ~inside & (kind == 0x2C), ~inside & (kind == 0x21)
        table = tf.cast(colors(at(place + 9)), tf.int32)
        length = tf.cast(kind, tf.int32)
        move = tf.where(inside, 1 + length, tf.where(frame, 11 + table, tf.where(extension, 2, end)))
        return (
            place + move,
            tf.where(inside, kind != 0, frame | extension),
            total + tf.where(frame, side[0] * side[1], 0),
        )

    first = 13 + tf.cast(colors(at(10)), tf.int32)
    start = (first, tf.constant(False), tf.constant(0, tf.int64))
    place, _, total = tf.while_loop(
        lambda place, *_: place < end, step, start, parallel_iterations=1, maximum_iterations=MOST_BLOCKS
    )
    return tf.where(place < end, tf.int64.max, total)


def bitmap_sides(data):
    """(width, height) of a BMP, int64 scalars, a negative height where the top row comes first.

    Args:
        data: its first bytes, int64 [26 or more].
    """
    old = little(data[14:18]) == OLD_BITMAP
    width = tf.where(old, little(data[18:20]), _signed(data[18:22]))
    return width, tf.where(old, little(data[20:22]), _signed(data[22:26]))


def little(data):
    """The number in some bytes, given as int64 [n], the lowest byte first."""
    return tf.reduce_sum(data * [256**i for i in range(data.shape[0])])


def _big(data):
    return little(data[::-1])


def _signed(data):
    value = little(data)
    return tf.where(value >= 2**31, value - 2**32, value)
