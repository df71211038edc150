"""Weight files of few bytes that ask for much memory or time; run as a script, reads each and tells what it took.

`python bombs.py FOLDER` prints a line of JSON for each: its name, the message, seconds, and the peak of memory so far.
"""

import io
import json
import pickle
import resource
import signal
import struct
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

SECONDS = 30
NESTED = b")" + 60 * b"2\x86"  # a tuple of twice a tuple of twice ...: 2^60 elements when written out or hashed
HUGE = struct.pack("<Q", 6 << 30)
LEGACY = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))


def string(value):
    return b"X" + struct.pack("<I", len(value)) + value


def zipped(members, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tensor(numel, size, stride, kind=b"ctorch\nFloatStorage\n", tag=None):
    reference = (
        b"("
        + (tag or string(b"storage"))
        + kind
        + string(b"0")
        + string(b"cpu")
        + b"J"
        + struct.pack("<i", numel)
        + b"tQ"
    )
    sides = b"".join(b"(" + b"".join(b"J" + struct.pack("<i", n) for n in ints) + b"t" for ints in (size, stride))
    return b"ctorch._utils\n_rebuild_tensor\n(" + reference + b"K\x00" + sides + b"tR"


def torch(content, storage=bytes(16)):
    return zipped({"a/data.pkl": b"\x80\x02" + content + b".", "a/data/0": storage}, zipfile.ZIP_STORED)


def many(first, again, count):
    """A dict of `count` entries: the first remembered as 1, and what is made of it again and again."""
    entries = b"".join(string(b"%d" % i) + again for i in range(count))
    return b"\x80\x02" + first + b"r\x01\x00\x00\x000}(" + entries + b"u."


def npy(shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def bombs():
    """(name, the file's content) one by one; some are large while they are made."""
    raw = bytes(1 << 20)
    ravel = b"cnumpy._core.numeric\n_frombuffer\n(h\x01cnumpy\ndtype\n" + string(b"u1") + b"\x85R"
    ravel += b"J" + struct.pack("<i", len(raw)) + b"\x85" + string(b"C") + b"tR"
    ordered = b"ccollections\nOrderedDict\nh\x01\x85R"
    yield "11 bytes", b"\x80\x05\x96" + HUGE
    yield "bytes", b"\x80\x04\x8e" + HUGE
    yield "text", b"\x80\x04\x8d" + HUGE
    yield "frame", b"\x80\x04\x95" + HUGE
    yield "nested key", b"\x80\x02}" + NESTED + b"K\x01s."
    yield "nested key of an ordered dict", b"\x80\x02ccollections\nOrderedDict\n](" + NESTED + b"K\x01\x86e\x85R."
    yield "nested element of a set", b"\x80\x04\x8f(" + NESTED + b"\x90."
    yield "nested tag", torch(tensor(4, (2,), (1,), tag=NESTED))
    yield "nested type of storage", torch(tensor(4, (2,), (1,), kind=NESTED))
    yield "nested shape", b"\x80\x02ctorch\nSize\n" + NESTED + b"\x85R."
    yield "nested dtype", b"\x80\x02cnumpy\ndtype\n" + NESTED + b"\x85R."
    yield "nested byte order", b"\x80\x02cnumpy\ndtype\n" + string(b"f4") + b"\x85R(K\x03" + NESTED + b"NNNtb."
    yield "nested type of array", b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n" + NESTED + b"\x85R."
    yield "nested encoding", b"\x80\x02c_codecs\nencode\n(" + string(b"a") + NESTED + b"tR."
    yield "nested version", LEGACY[:0] + pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02" + NESTED + b"."
    yield "nested storage key", LEGACY + b"\x80\x02}.\x80\x02]" + NESTED + b"a."
    yield "keys that hash alike", b"\x80\x02}(" + b"".join(
        b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, 50_000)
    ) + b"u."  # fmt: skip
    yield (
        "indices that hash alike",
        b"\x80\x02N" + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(1, 50_000)) + b".",
    )
    yield "list copied", many(b"](" + string(b"a") + b"N\x86" + 200_000 * b"2" + b"e", ordered, 5_000)
    yield "sizes copied", many(b"](" + 200_000 * b"N" + b"e", b"ctorch\nSize\nh\x01\x85R", 5_000)
    yield "text encoded", many(string(raw), b"c_codecs\nencode\n(h\x01" + string(b"latin1") + b"tR", 8_000)
    yield "array copied", many(string(raw), ravel, 8_000)
    view = tensor(1 << 18, (512, 512), (1, 512))
    views = b"".join(string(b"%d" % i) + view for i in range(8_000))
    yield "storage copied", torch(b"}(" + views + b"u", raw)
    yield "instructions", b"\x80\x02" + 4_000_000 * b"}" + b"."
    yield "instructions in a zip", zipped({"a/data.pkl": b"\x80\x02" + (8 << 20) * b"}" + b"."})
    yield "zip of zeros", zipped({"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(100 << 20)})
    yield "npz of zeros", zipped({"a.npy": npy(f"({25 << 20},)") + bytes(100 << 20)})
    yield "npz of a large shape", zipped({"a.npy": npy(f"({3 << 30},)")})
    yield "another compression", zipped({"a/data.pkl": b"\x80\x02}."}, zipfile.ZIP_LZMA)


def main(folder):
    from retinanet_keras.errors import UserError
    from retinanet_keras.weights import reader

    path = Path(folder, "bomb")
    for name, content in bombs():
        path.write_bytes(content)
        before, start = peak_mb(), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            message = f"read: {len(reader.read(path))} weights"
        except UserError as error:
            message = str(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        took = {"seconds": time.process_time() - start, "more_mb": peak_mb() - before}
        print(json.dumps({"name": name, "bytes": len(content), "message": message, **took}), flush=True)


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    np.zeros(1)
    main(sys.argv[1])
