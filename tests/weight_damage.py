"""Damaged weight files, and a process that loads each: right, refused in a sentence, or a fault.

`python weight_damage.py COUNT SEED FOLDER` prints the outcomes as JSON in its last line. The file at hand is in FOLDER,
whatever becomes of the process.
"""

import io
import json
import pickle
import random
import resource
import signal
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
SUFFIXES = {
    "keras": ".keras", "weights": ".weights.h5", "backbone": ".weights.h5", "no checksum": ".weights.h5",
    "torch": ".pth", "npz": ".npz", "old torch": ".pth", "pickle": ".pkl", "old pickle": ".pkl",
}  # fmt: skip
WITHOUT_CHECKSUM = ("no checksum", "old torch", "pickle", "old pickle")  # changed numbers cannot be noticed in them,
# nor where a checksum was written after the change
SECONDS = 60


def truncated(data, random):
    return data[: random.randrange(len(data))]


def flipped(data, random):
    """One to eight bits."""
    data = bytearray(data)
    for _ in range(random.randint(1, 8)):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def overwritten(data, random):
    """A run of zeros, of ones, or of noise."""
    start, length = random.randrange(len(data)), random.randint(1, 64)
    return (
        data[:start]
        + random.choice((bytes(length), b"\xff" * length, random.randbytes(length)))[: len(data) - start]
        + data[start + length :]
    )


def cut_out(data, random):
    start = random.randrange(len(data))
    return data[:start] + data[start + random.randint(1, 4096) :]


def at_an_end(data, random):
    """Bytes among the first or the last 200, where headers and directories are."""
    place = random.choice((random.randrange(200), len(data) - 1 - random.randrange(200))) % len(data)
    run = random.choice((b"\0", b"\xff", b"\x80", random.randbytes(1), random.randbytes(4), b"\xff\xff\xff\x7f"))
    return data[:place] + run + data[place + len(run) :]


def swapped(data, random):
    """Two blocks, as a disk may mix them up."""
    size = min(512, len(data) // 4)
    first, second = sorted(random.randrange(len(data) // size) * size for _ in range(2))
    one, two = data[first : first + size], data[second : second + size]
    return (
        data[:first] + two + data[first + size : second] + one + data[second + size :] if len(one) == len(two) else data
    )


def longer(data, random):
    return data + random.randbytes(random.randint(1, 3000))


def inside(data, random):
    """A member of a zip archive, which has the right checksum afterwards; other files as `at_an_end`."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return at_an_end(data, random)
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(file, "w") as after:
        members = {name: before.read(name) for name in before.namelist()}
        victim = random.choice([name for name in members if members[name]])
        members[victim] = random.choice((truncated, flipped, overwritten, cut_out, at_an_end))(members[victim], random)
        for name, content in members.items():
            after.writestr(name, content)
    return file.getvalue()


MUTATIONS = (truncated, flipped, inside, flipped, overwritten, cut_out, at_an_end, inside, at_an_end, swapped, longer)


def mutated(originals, number, seed):
    """(kind, mutation's name, bytes): one damaged file, the same for the same arguments; now and then damaged twice."""
    chance = random.Random(f"{seed}-{number}")
    kind = list(SUFFIXES)[number % len(SUFFIXES)]
    mutation = MUTATIONS[number // len(SUFFIXES) % len(MUTATIONS)]
    data = mutation(originals[kind], chance)
    if data and chance.random() < 0.2:
        data = flipped(data, chance)
    return kind, mutation.__name__, data


def run(count, seed, folder, seconds=0):
    """Load damaged files, as the module says, each for at most some seconds, if so many are given."""
    import keras

    import retinanet_keras  # noqa: F401  (before Keras)
    from retinanet_keras import RetinaNet, backbone
    from retinanet_keras.errors import UserError
    from retinanet_keras.training import loading
    from retinanet_keras.weights import imagenet, reader

    keras.utils.set_random_seed(0)
    categories = [{"label": i, "id": i + 1, "name": name} for i, name in enumerate("abc")]
    model = RetinaNet(
        3, "resnet18", width=2, fpn_channels=4, head_depth=1, norm="frozen", freeze_at=0, categories=categories
    )
    net = backbone.resnet("resnet18", width=2, norm="frozen")
    expected = {"model": model.get_weights(), "net": net.get_weights()}
    mean = (1.0, 2.0, 3.0)
    arrays = {f"w{i}": np.arange(50.0, dtype="float32").reshape(5, 10) + i for i in range(3)}

    def of_keras(path):
        again = loading.of_file(path, "--model")
        return again.get_config() == model.get_config() and same(again.get_weights(), expected["model"])

    def of_weights(path):
        model.set_weights([0 * value for value in expected["model"]])
        model.load_weights(path)
        return same(model.get_weights(), expected["model"])

    def of_backbone(path):
        net.set_weights([0 * value for value in expected["net"]])
        return imagenet.load(net, path) == mean and same(net.get_weights(), expected["net"])

    def of_files(kind):
        return lambda path: same(list(reader.read(path).values()), released[kind])

    path = Path(folder, "original.npz")
    np.savez_compressed(path, **arrays)
    originals = {"npz": path.read_bytes(), "torch": (DATA / "zip.pth").read_bytes()}
    originals |= {"old torch": (DATA / "legacy.pth").read_bytes(), "old pickle": pickle.dumps(arrays, 0)}
    originals["pickle"] = pickle.dumps({"model": arrays}, 4)
    for kind, save in {
        "keras": model.save, "weights": model.save_weights,
        "backbone": lambda path: imagenet.save(net, path, mean),
        "no checksum": lambda path: keras.Model.save_weights(model, path),
    }.items():  # fmt: skip
        path = Path(folder, f"original{SUFFIXES[kind]}")
        save(path)
        originals[kind] = path.read_bytes()
    loaders = {"keras": of_keras, "weights": of_weights, "no checksum": of_weights, "backbone": of_backbone}
    released = {}
    for kind in SUFFIXES.keys() - loaders.keys():
        (Path(folder) / "whole").write_bytes(originals[kind])
        released[kind] = list(reader.read(Path(folder) / "whole").values())
        loaders[kind] = of_files(kind)

    outcomes, faults = Counter(), []
    for number in range(-len(SUFFIXES), count):  # first each undamaged
        kind, name, data = mutated(originals, number, seed)
        if number < 0:
            name, data = "undamaged", originals[kind]
        path = Path(folder, f"input{SUFFIXES[kind]}")
        path.write_bytes(data)
        signal.alarm(seconds)
        try:
            outcome = "right" if loaders[kind](path) else "wrong"
        except UserError as error:
            outcome = "refused" if "\n" not in str(error) and len(str(error)) < 1000 else f"not a sentence: {error}"
        except ValueError as error:  # Keras's, of what it cannot load; the commands show its first line
            known = kind == "no checksum" and "objects could not be loaded" in str(error)
            outcome = "refused" if known else f"{type(error).__name__}: {error}"
        except Exception as error:  # what is looked for
            outcome = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        if outcome == "wrong" and (kind in WITHOUT_CHECKSUM or name == "inside"):
            outcome = "unnoticed"
        if outcome not in ("right", "refused", "unnoticed"):
            Path(folder, f"fault-{number}{SUFFIXES[kind]}").write_bytes(data)
            faults.append(f"{number} ({kind}, {name}): {outcome[:300]}")
            outcome = "fault"
        outcomes[f"{'undamaged' if number < 0 else kind}: {outcome}"] += 1
    return {"outcomes": outcomes, "faults": faults, "peak_mb": peak_mb()}


def same(first, second):
    return len(first) == len(second) and all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], SECONDS)))
