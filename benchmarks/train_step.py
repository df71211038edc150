"""One training step against KerasHub's and torchvision's RetinaNet, and what its arithmetic costs: time, peak memory.

    python benchmarks/train_step.py [--torch PYTHON] [--rounds N] [--only-shipped]

ResNet-50, two images of 512 x 512 pixels with 10 boxes each, 80 classes, random weights, on the CPU. KerasHub's and
torchvision's detectors have their own losses and label encoders. First each is trained as it ships: ours as the paper's
configuration builds it; KerasHub's with every layer, under XLA (its default) and as a plain graph; torchvision's
`retinanet_resnet50_fpn` with the layers that it trains from a pretrained backbone (as ours), in channels-last memory,
run by PYTHON, which has torch and torchvision (skipped where it has not). Then the same layers are trained in ours and
KerasHub's in its faster mode: strides and P6 are moved to the same places, and the counts of weights and of
multiply-adds have to agree. The floor is the arithmetic of three forward passes at the rate of this machine's matrix
products.

Each subject trains in a process of its own, those in Keras by `model.fit`; those of a comparison take turns step by
step, so that whatever else the machine does falls on all, and medians are compared. Memory is what the process holds at
its peak, libraries and weights included, from before its first step to the end: tracing and compilation count. The exit
status is 1 where a ratio misses its bound. Takes six minutes on two CPU cores. Linux only: memory is read from /proc.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # a Python that has torch need not have this package
import retinanet_keras  # noqa: E402, F401, I001  (sets up the process, before TensorFlow is imported)

from turns import Process, judge, tell, torchvision_module

from retinanet_keras import runtime

SIDE, IMAGES, BOXES, CLASSES = 512, 2, 10, 80
WARM_UP = 2  # steps that trace, compile and fill the allocator
# The most that our step may take, as parts of KerasHub's: seconds, and memory at the peak. And of torchvision's time.
SHIPPED = {"time": 0.70, "memory": 0.85}
EQUAL = {"time": 1.0, "memory": 1.0}
TORCH_SHIPPED = 0.80
FLOOR = 1.15  # times the arithmetic of three forward passes

# What is trained: all of KerasHub's against the paper's, and twice the same layers, batch normalization frozen.
SHIPS, ALL, UPPER = "as each ships", "all layers, batch norm frozen", "stem and res2 frozen too"
OURS, GRAPH, XLA, PRODUCTS = "ours", "KerasHub, graph", "KerasHub, XLA", "matrix products"
TORCH = "torchvision"


def make_batch():
    """Images uint8 [B, S, S, 3], and the truth: boxes of 16 to 300 pixels [B, N, 4] and labels [B, N]."""
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, SIDE, SIDE, 3)).astype("uint8")
    sides = np.exp(rng.uniform(np.log(16), np.log(300), (IMAGES, BOXES, 2)))
    corner = rng.uniform(0, 1, sides.shape) * (SIDE - sides)
    boxes = np.concatenate([corner, corner + sides], axis=-1).astype("float32")
    return images, {"boxes": boxes, "labels": rng.integers(0, CLASSES, (IMAGES, BOXES)).astype("int32")}


def our_model(training):
    """(compiled model, its backbone, images as it takes them)."""
    from retinanet_keras import RetinaNet, optimizers
    from retinanet_keras.config import TrainConfig

    stride_in = None if training == SHIPS else "3x3"  # where KerasHub has it: 2% more arithmetic
    model = RetinaNet(CLASSES, "resnet50", norm="frozen", freeze_at=0 if training == ALL else 2, stride_in=stride_in)
    shrink_branches(model.backbone, "_conv3_norm")
    model.compile(optimizers.build(TrainConfig()))
    return model, model.backbone, make_batch()[0]


def their_model(training, jit):
    """The same of KerasHub's."""
    import keras
    import keras_hub

    from retinanet_keras import backbone

    resnet = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64], input_conv_kernel_sizes=[7], stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[3, 4, 6, 3], stackwise_num_strides=[1, 2, 2, 2], block_type="bottleneck_block",
    )  # fmt: skip
    pyramid = keras_hub.models.RetinaNetBackbone(resnet, min_level=3, max_level=7, use_p5=True)  # P6 from C5
    model = keras_hub.models.RetinaNetObjectDetector(pyramid, CLASSES, bounding_box_format="xyxy")
    if training != SHIPS:
        for layer in resnet.layers:
            early = training == UPPER and layer.name.startswith(("conv1_", "stack0_"))
            layer.trainable = not (early or isinstance(layer, keras.layers.BatchNormalization))
        shrink_branches(resnet, "_3_bn")
    # Its subnets start without the prior of §4.1, with a loss of thousands: a larger rate diverges at once.
    model.compile(keras.optimizers.SGD(1e-5, momentum=0.9), jit_compile=jit)
    return model, resnet, ((make_batch()[0] - backbone.MEAN) / backbone.STD).astype("float32")


def shrink_branches(backbone, last_norm):
    """Scale the residual branches: with random weights and frozen statistics each block would double the variance."""
    for layer in backbone.layers:
        if layer.name.endswith(last_norm):
            layer.gamma.assign(0.2 * layer.gamma)


def make_model(name, training):
    return our_model(training) if name == OURS else their_model(training, jit=name == XLA)


def weights_in(variables):
    return sum(math.prod(variable.shape) for variable in variables)


def resident_mb(field):
    """VmRSS, the memory now, or VmHWM, its peak since the last reset, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"expected {field} in /proc/self/status, which Linux has; found none")


def train(name, training, rounds):
    """In a process of its own: trains a subject, each step after the warm-up at a line of stdin, and tells of each."""
    runtime.set_up(runtime.LARGE_TRAINING)
    import keras
    import tensorflow as tf

    class Turns(keras.callbacks.Callback):
        def on_train_batch_begin(self, step, logs=None):
            if step >= WARM_UP and not sys.stdin.readline():
                raise SystemExit("nobody waits for the next step")
            self.start, self.busy = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, step, logs=None):
            loss = float(logs["loss"])  # waits for the result
            seconds, busy = time.perf_counter() - self.start, time.process_time() - self.busy
            tell(seconds=seconds, busy=busy, loss=loss, peak=resident_mb("VmHWM"))

    model, backbone, images = make_model(name, training)
    batches = tf.data.Dataset.from_tensors((images, make_batch()[1])).repeat()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    tell(
        before=resident_mb("VmRSS"), backbone=weights_in(backbone.trainable_weights),
        all=weights_in(model.trainable_weights),
    )  # fmt: skip
    model.fit(batches, steps_per_epoch=WARM_UP + rounds, callbacks=[Turns()], verbose=0)


def train_torchvision(rounds):
    """`train` for torchvision: the layers that `retinanet_resnet50_fpn` builds where its backbone is pretrained."""
    import torch

    tv = torchvision_module(torch)
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    resnet = tv.models.resnet50(weights=None, norm_layer=tv.ops.misc.FrozenBatchNorm2d)
    for name, module in resnet.named_modules():
        if name.endswith(".bn3"):
            module.weight.mul_(0.2)
    backbone = _resnet_fpn_extractor(resnet, 3, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    model = tv.models.detection.RetinaNet(backbone, CLASSES, min_size=SIDE, max_size=SIDE)
    model = model.train().to(memory_format=torch.channels_last)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-4)
    images, truth = make_batch()
    pixels = [torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in images]
    targets = [
        {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels).long()}
        for boxes, labels in zip(truth["boxes"], truth["labels"], strict=True)
    ]

    def step():
        loss = sum(model(pixels, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    weights = [weight for weight in backbone.body.parameters() if weight.requires_grad]
    tell(before=resident_mb("VmRSS"), backbone=weights_in(weights), all=weights_in(trained))
    for turn in range(WARM_UP + rounds):
        if turn >= WARM_UP and not sys.stdin.readline():
            return
        start, busy = time.perf_counter(), time.process_time()
        loss = step()
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        tell(seconds=seconds, busy=busy, loss=loss, peak=resident_mb("VmHWM"))


def multiply(rounds, side=4096, calls=4):
    """In a process of its own: tells of the operations per second of float32 matrix products, at lines of stdin."""
    import tensorflow as tf

    a = tf.random.normal((side, side))
    for turn in range(1 + rounds):
        if turn and not sys.stdin.readline():
            return
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            tf.matmul(a, a)
            seconds.append(time.perf_counter() - start)
        tell(rate=2 * side**3 / min(seconds))


def count_operations(training):
    """In a process of its own: tells of a forward pass's operations, two per multiply-add, from its convs' shapes."""
    import tensorflow as tf

    found = {}
    for name in (OURS, GRAPH):
        model = make_model(name, training)[0]
        forward = tf.function(lambda images, model=model: model(images, training=True))
        graph = forward.get_concrete_function(tf.TensorSpec((IMAGES, SIDE, SIDE, 3))).graph
        convs = [op for op in graph.get_operations() if op.type == "Conv2D"]
        # An output [B, H, W, C'] and a kernel [h, w, C, C'].
        found[name] = sum(2 * math.prod(op.outputs[0].shape) * math.prod(op.inputs[1].shape[:3]) for op in convs)
    tell(**found)


def start(name, training, rounds, torch):
    """A subject's process: ours is set up as `train.py` does it, others are left as they are."""
    python = torch if name == TORCH else sys.executable
    return Process(__file__, name, training, rounds, python=python, **({} if name == OURS else {runtime.SWITCH: "off"}))


def compare(training, names, rounds, torch=None):
    """{name: dict} of what each subject told; of the steps, lists of "seconds" and "busy"; "rate" the turns' best."""
    print(f"{training}: tracing ...", end=" ", flush=True)
    processes, found = {}, {}
    try:
        for name in names:  # side by side: tracing keeps one core busy
            processes[name] = start(name, training, rounds, torch)
        for name, process in list(processes.items()):
            found[name] = process.hear() if name == TORCH else process.expect()
            if found[name] is None:
                print(f"\n{name} is skipped: {process.last_errors().strip().splitlines()[-1]}")
                del found[name]
                processes.pop(name).end()
                continue
            for _ in range(0 if name == PRODUCTS else WARM_UP):
                found[name].update(process.expect(), seconds=[], busy=[])
        print("timing", end=" ", flush=True)
        for _ in range(rounds):
            for name, process in processes.items():
                told = process.go_on()
                if name == PRODUCTS:
                    found[name]["rate"] = max(found[name]["rate"], told["rate"])
                    continue
                for part in ("seconds", "busy"):
                    found[name][part].append(told.pop(part))
                found[name].update(told)
            print(".", end="", flush=True)
        print(" done", flush=True)
    finally:
        for process in processes.values():
            process.end()
    for name, told in found.items():
        if not math.isfinite(told.get("loss", 0)):
            raise RuntimeError(
                f"{training}, {name}: expected a finite loss, got {told['loss']}; its times mean nothing"
            )
    return found


def check_equal_work(training, found, operations):
    """Raises unless both train as many weights, with as much arithmetic."""
    ours, theirs = (value for name, value in found.items() if name != PRODUCTS)
    for part in ("backbone", "all"):
        if ours[part] != theirs[part]:
            raise RuntimeError(f"{training}: ours trains {ours[part]:,} weights ({part}), KerasHub {theirs[part]:,}")
    if operations[OURS] != operations[GRAPH]:
        raise RuntimeError(
            f"a forward pass of ours has {operations[OURS]:,} operations, KerasHub's {operations[GRAPH]:,}"
        )
    print(f"  both train {ours['backbone']:,} weights of the backbone, {ours['all']:,} in all")


def print_table(measured):
    print(
        f"\n{'trained':30}  {'subject':16}  {'s/step':>6}  {'CPU s':>5}  {'images/s':>8}  {'peak MB':>7}  {'growth':>6}"
        f"  {'backbone weights':>16}  {'loss':>8}"
    )
    for training, found in measured.items():
        for name, told in found.items():
            if name == PRODUCTS:
                continue
            seconds, busy = statistics.median(told["seconds"]), statistics.median(told["busy"])
            print(
                f"{training:30}  {name:16}  {seconds:6.2f}  {busy:5.2f}  {IMAGES / seconds:8.3f}  {told['peak']:7.0f}"
                f"  {told['peak'] - told['before']:6.0f}  {told['backbone']:16,}  {told['loss']:8.4g}"
            )
    print('("CPU s": of all cores in a step; "growth": the peak less what the process held before its first step)\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each subject (5)")
    parser.add_argument("--torch", default=".venv-backends/bin/python", help="a Python with torch and torchvision")
    parser.add_argument("--only-shipped", action="store_true", help="skip the comparisons of equal layers")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "TRAINED", "ROUNDS"), help="a process that measures")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    if arguments.child:
        name, training, rounds = arguments.child
        if name == PRODUCTS:
            multiply(int(rounds))
        elif name == TORCH:
            train_torchvision(int(rounds))
        elif name == "operations":
            count_operations(training)
        else:
            train(name, training, int(rounds))
        return

    runtime.set_up(runtime.LARGE_TRAINING)
    print(f"{runtime.processor()}, in our process")
    counting = start("operations", ALL, 0, None)
    operations = counting.expect()
    counting.end()
    measured = {SHIPS: compare(SHIPS, (OURS, GRAPH, XLA, TORCH), rounds, arguments.torch)}
    # By the best steps: another's load only adds, and the slower mode would be an easier opponent below.
    faster = min((GRAPH, XLA), key=lambda name: min(measured[SHIPS][name]["seconds"]))
    print(f"  KerasHub's faster mode: {faster}")
    if not arguments.only_shipped:
        measured[ALL] = compare(ALL, (OURS, faster, PRODUCTS), rounds)
        check_equal_work(ALL, measured[ALL], operations)
        measured[UPPER] = compare(UPPER, (OURS, faster), rounds)
        check_equal_work(UPPER, measured[UPPER], operations)
    print_table(measured)

    missed = 0
    for training, found in measured.items():
        ours, theirs = found[OURS], found[faster]
        bounds = SHIPPED if training == SHIPS else EQUAL
        time_ratio = statistics.median(ours["seconds"]) / statistics.median(theirs["seconds"])
        missed += judge(f"{training}: time, ours / {faster}", time_ratio, bounds["time"])
        missed += judge(f"{training}: memory, ours / {faster}", ours["peak"] / theirs["peak"], bounds["memory"])
        if TORCH in found:
            time_ratio = statistics.median(ours["seconds"]) / statistics.median(found[TORCH]["seconds"])
            missed += judge(f"{training}: time, ours / {TORCH}", time_ratio, TORCH_SHIPPED)
    if arguments.only_shipped:
        sys.exit(1 if missed else 0)
    rate = measured[ALL][PRODUCTS]["rate"]
    floor = 3 * operations[OURS] / rate
    print(f"floor: 3 x {operations[OURS] / 1e9:.1f} GFLOP at {rate / 1e9:.0f} GFLOP/s: {floor:.2f} s")
    missed += judge(f"{ALL}: time, ours / floor", statistics.median(measured[ALL][OURS]["seconds"]) / floor, FLOOR)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
