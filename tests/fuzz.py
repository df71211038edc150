"""Damaged image files, and a process that asks an export about thousands of them.

    python tests/fuzz.py SAVED_MODEL COUNT SEED FOLDER

What is sent next is in FOLDER/input before it is sent, so that it is there after a crash. Faults, which are answers
other than detections or INVALID_ARGUMENT, go to FOLDER/fault-N, and the input after which the process's peak of memory
was most higher than before to FOLDER/hungry. Prints what came of them as one line of JSON.
"""

import io
import json
import random
import resource
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
# Where the width of each format's header is: its bytes and the way to read them; JPEG's is searched for.
WIDTHS = {"PNG": (16, ">I"), "GIF": (6, "<H"), "BMP": (18, "<i"), "WEBP": (26, "<H")}


def originals():
    """{format: list of files} of a few sizes and modes."""
    files = {}
    for kind in FORMATS:
        files[kind] = []
        for seed, size in enumerate([(40, 30), (7, 5), (64, 64)]):
            pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), "uint8")
            image = Image.fromarray(pixels).resize(size)
            for mode in {
                "JPEG": ("RGB", "L", "CMYK"),
                "PNG": ("RGB", "RGBA", "P", "I;16"),
                "WEBP": ("RGB", "RGBA"),
                "BMP": ("RGB", "RGBA", "P", "1"),
            }.get(kind, ("RGB",)):
                buffer = io.BytesIO()
                options = {"JPEG": {"progressive": seed == 1}, "WEBP": {"lossless": seed == 1}}.get(kind, {})
                shown = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
                if mode == "RGBA":
                    shown.putalpha(image.convert("L"))
                shown.save(buffer, kind, **options)
                files[kind].append(buffer.getvalue())
    return files


def truncated(data, random, kind):
    return data[: random.randrange(len(data))]


def flipped(data, random, kind):
    """One to eight bits."""
    data = bytearray(data)
    for _ in range(random.randint(1, 8)):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def overwritten(data, random, kind):
    """A run of zeros, of ones, or of noise."""
    start, length = random.randrange(len(data)), random.randint(1, 64)
    run = random.choice((bytes(length), b"\xff" * length, random.randbytes(length)))
    return data[:start] + run + data[start + length :]


def cut_out(data, random, kind):
    start = random.randrange(len(data))
    return data[:start] + data[start + random.randint(1, 64) :]


def header(data, random, kind):
    """A byte among the first 64."""
    place = random.randrange(min(64, len(data)))
    return data[:place] + random.choice((b"\0", b"\xff", b"\x80", b"\x7f", random.randbytes(1))) + data[place + 1 :]


def resized(data, random, kind):
    """Another size in the header than the data's: huge, zero, negative."""
    if kind == "JPEG":
        # The frame's marker, FFC0 or FFC2, its length and precision; then height and width.
        places = [i for marker in (b"\xff\xc0", b"\xff\xc2") for i in [data.find(marker)] if i > 0]
        place, form = (min(places) + 5, ">H") if places else (0, ">H")
    else:
        place, form = WIDTHS[kind]
    step = struct.calcsize(form)
    sides = [0, 1, 65535, 65500, 8000, 16383, 32767] + ([2**31 - 1, 100_000, 2**24] if step == 4 else [])
    if form == "<i":
        sides += [-1, -(2**31), -40]
    data = bytearray(data)
    for i in random.choice(((0,), (1,), (0, 1))):
        struct.pack_into(form, data, place + i * step, random.choice(sides))
    if kind == "PNG" and random.random() < 0.8:  # else the checksum alone refuses it
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data)


def joined(data, random, kind):
    """With another file: after it, before it, or in the middle of it."""
    other = random.choice([file for files in ORIGINALS.values() for file in files])
    place = random.choice((0, len(data), random.randrange(len(data))))
    return data[:place] + other + data[place:]


def tiny(data, random, kind):
    """Nothing, or no more than a magic number."""
    return data[: random.randint(0, 12)]


def noise(data, random, kind):
    """Alone, or after a magic number: of this format, or of JPEG XL, which TensorFlow 2.21 names as one of its own."""
    starts = (b"", data[:8], b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
    return random.choice(starts) + random.randbytes(random.randrange(400))


MUTATIONS = (truncated, flipped, flipped, overwritten, cut_out, header, resized, joined, tiny, noise)
ORIGINALS = originals()


def mutated(number, seed):
    """(mutation's name, bytes): one damaged file, the same for the same numbers; now and then damaged twice."""
    chance = random.Random(f"{seed}-{number}")
    kind = FORMATS[number % len(FORMATS)]
    mutation = MUTATIONS[number // len(FORMATS) % len(MUTATIONS)]
    data = mutation(chance.choice(ORIGINALS[kind]), chance, kind)
    if data and chance.random() < 0.2:
        data = flipped(data, chance, kind)
    return f"{kind} {mutation.__name__}", data


def main(saved_model, count, seed, folder):
    import tensorflow as tf

    folder, outcomes, faults = Path(folder), Counter(), []
    graph = tf.Graph()
    with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
        meta = tf.compat.v1.saved_model.loader.load(session, ["serve"], saved_model)
        signature = meta.signature_def["serving_bytes"]
        entry = signature.inputs["image_bytes"].name
        fetches = {name: info.name for name, info in signature.outputs.items()}

        def ask(data):
            """ "detections", "refused", or what is wrong with the answer."""
            try:
                found = session.run(fetches, {entry: [data]})
            except tf.errors.InvalidArgumentError:
                return "refused"
            except tf.errors.OpError as error:
                return f"{type(error).__name__}: {error.message[:200]}"
            boxes, scores = found["boxes"], found["scores"]
            n = found["num_detections"][0]
            if not (np.isfinite(boxes).all() and np.isfinite(scores).all() and 0 <= n <= scores.shape[1]):
                return "detections that are not finite"
            return "detections"

        for file in [file for files in ORIGINALS.values() for file in files]:
            outcomes[f"undamaged: {ask(file)}"] += 1
        before, most = peak_mb(), (0, "")
        for number in range(count):
            name, data = mutated(number, seed)
            (folder / "input").write_bytes(data)
            outcome = ask(data)
            if outcome not in ("detections", "refused"):
                (folder / f"fault-{number}").write_bytes(data)
                faults.append(f"{number} ({name}): {outcome}")
                outcome = "fault"
            outcomes[outcome] += 1
            if peak_mb() - before > most[0]:
                most = peak_mb() - before, f"{number} ({name}, {len(data)} bytes): {outcome}"
                (folder / "hungry").write_bytes(data)
            before = peak_mb()
    print(json.dumps({"outcomes": outcomes, "faults": faults, "peak_mb": peak_mb(), "hungriest": most}))


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
