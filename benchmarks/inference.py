"""The exported detector against KerasHub's, torchvision's, and what its arithmetic costs.

    python benchmarks/inference.py [--torch PYTHON] [--threads N] [--rounds N] [--size HxW ...]

ResNet-50, 80 classes, one image, random weights, pixels to detections, on the CPU: ours through TF Serving's loader;
KerasHub's as a TensorFlow graph with its decoding and NMS; torchvision's `retinanet_resnet50_fpn` in inference mode,
run by PYTHON, which has torch and torchvision (skipped where it has not). In float32 and, where the processor computes
it, ours and torchvision's in bfloat16. The floor is the counted arithmetic of our convolutions at the rate of this
machine's matrix products of that type.

Each subject has a process of its own; they take turns, image by image, so that whatever else the machine does falls on
all, and medians are compared. Of what comes after the heads, the worst case is timed: every level's 1,000 best pass.
Batches, and requests that come at once, are timed with one thread an operation and with all. The warmed signatures are
called a hundred times at the first size. The exit status is 1 where a bound is missed. Ten minutes on two CPU cores.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # a Python that has torch need not have this package

from turns import Process, judge, tell, torchvision_module

from retinanet_keras import runtime

SIZES = ("512x512", "800x1344")
CLASSES = 80
WARM_UP = 3
OURS, OURS16, HUB = "ours", "ours, bfloat16", "KerasHub"
REWRITTEN = "ours, float32 rewritten"  # by TensorFlow, as the server's --mixed_precision=bfloat16 has it
TORCH, TORCH16 = "torchvision", "torchvision, bfloat16"
PEERS = (HUB, TORCH, TORCH16)  # as they are, without what `runtime` sets up
PRODUCT, PRODUCT16, AFTER = "matrix product", "matrix product, bfloat16", "after the heads"
BFLOAT16 = (OURS16, REWRITTEN, TORCH16, PRODUCT16)
# The most that ours may take, as parts of another's time.
PEER = {"512x512": 0.85, "800x1344": 1.0}
FLOOR, HALF, TORCH_HALF, AFTER_PART, SECOND = 1.08, 1 / 1.6, 1.1, 0.01, 1.5
DISK, LOAD = 1.03, 5.0  # parts of the float32 weights; seconds


def image(height, width):
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (1, height, width, 3)).astype("uint8")


def our_model():
    from retinanet_keras import RetinaNet

    categories = [{"label": i, "id": i + 1, "name": f"class {i}"} for i in range(CLASSES)]
    model = RetinaNet(CLASSES, "resnet50", norm="frozen", categories=categories)
    for layer in model.backbone.layers:  # else each block would double the variance
        if layer.name.endswith("_conv3_norm"):
            layer.gamma.assign(0.2 * layer.gamma)
    return model


def write_exports(folder, sizes):
    """In a process of its own: an export for each size and precision; tells of the arithmetic and the bytes."""
    import tensorflow as tf

    from retinanet_keras.config import config_from_dict
    from retinanet_keras.serving.export import export_model

    model = our_model()
    told = {"weights": 4 * model.count_params()}
    for size in sizes.split(","):
        height, width = map(int, size.split("x"))
        config = config_from_dict({"data": {"short_side": min(height, width), "max_side": max(height, width)}})
        for precision in ("float32", "bfloat16"):
            path = export_model(model, config, Path(folder) / f"{size}-{precision}", 1, precision=precision, run=False)
            told[precision] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        forward = tf.function(lambda images: model(images))
        graph = forward.get_concrete_function(tf.TensorSpec((1, height, width, 3))).graph
        convs = [op for op in graph.get_operations() if op.type == "Conv2D"]
        # An output [B, H, W, C'] and a kernel [h, w, C, C'], two operations a multiply-add.
        told[size] = sum(2 * math.prod(op.outputs[0].shape) * math.prod(op.inputs[1].shape[:3]) for op in convs)
    tell(**told)


def saved_model(path, signature, told, rewrite=False):
    """A function of an input array, by the session loader."""
    import tensorflow as tf

    config = threads_of_session()
    if rewrite:
        config.graph_options.rewrite_options.auto_mixed_precision_onednn_bfloat16 = 1  # RewriterConfig.ON
    session = tf.compat.v1.Session(graph=tf.Graph(), config=config)
    start = time.perf_counter()
    with session.graph.as_default():
        meta = tf.compat.v1.saved_model.loader.load(session, ["serve"], path)
    told["load"] = time.perf_counter() - start
    (entry,) = meta.signature_def[signature].inputs.values()
    fetches = [output.name for output in meta.signature_def[signature].outputs.values()]
    return session.make_callable(fetches, [entry.name])


def threads_of_session():
    import tensorflow as tf

    threads = int(os.environ["BENCHMARK_THREADS"])
    return tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads)


def kerashub(height, width):
    import keras_hub
    import tensorflow as tf

    resnet = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64], input_conv_kernel_sizes=[7], stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[3, 4, 6, 3], stackwise_num_strides=[1, 2, 2, 2], block_type="bottleneck_block",
    )  # fmt: skip
    pyramid = keras_hub.models.RetinaNetBackbone(resnet, min_level=3, max_level=7, use_p5=True)  # P6 from C5
    model = keras_hub.models.RetinaNetObjectDetector(pyramid, CLASSES, bounding_box_format="xyxy")
    for layer in resnet.layers:
        if layer.name.endswith("_3_bn"):
            layer.gamma.assign(0.2 * layer.gamma)

    @tf.function(input_signature=[tf.TensorSpec([1, height, width, 3])])
    def detect(images):
        return model.decode_predictions(model(images, training=False), images)

    pixels = (image(height, width) / 127.5 - 1.0).astype("float32")
    return lambda: [value.numpy() for value in detect(pixels).values()]


def torchvision(height, width, half):
    import torch

    tv = torchvision_module(torch)
    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    model = tv.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=min(height, width),
        max_size=max(height, width),
    )  # fmt: skip
    model = model.eval().to(memory_format=torch.channels_last)
    pixels = torch.from_numpy(image(height, width)[0]).permute(2, 0, 1).float() / 255

    def detect():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            model([pixels])

    return detect


def product(half, side=2048):
    import tensorflow as tf

    a = tf.cast(tf.random.normal((side, side)), tf.bfloat16 if half else tf.float32)
    return lambda: tf.matmul(a, a).numpy()


def after_heads(height, width):
    import numpy as np
    import tensorflow as tf

    from retinanet_keras import anchors, detections

    rng = np.random.default_rng(0)
    sizes = anchors.level_sizes(height, width)
    logits = [tf.constant(rng.normal(-1, 1, (1, size, CLASSES)), tf.float32) for size in sizes]
    deltas = [tf.constant(rng.normal(0, 0.3, (1, size, 4)), tf.float32) for size in sizes]

    @tf.function
    def decode(logits, deltas, height, width):
        boxes = anchors.anchors_by_level(height, width)
        side = tf.cast([height], tf.float32), tf.cast([width], tf.float32)
        return detections.decode_levels(
            logits, deltas, boxes, *side, score_threshold=0.05, pre_nms_top_k=1000, nms_iou=0.5, max_detections=100,
            clip="before_nms", p7_threshold=None,
        )  # fmt: skip

    return lambda: decode(logits, deltas, tf.constant(height), tf.constant(width))["boxes"].numpy()


def subject(name, size, folder):
    """In a process of its own: one call at each line of stdin; tells of its seconds."""
    height, width = map(int, size.split("x"))
    told = {}
    if name not in (TORCH, TORCH16):
        import tensorflow as tf

        threads = int(os.environ["BENCHMARK_THREADS"])
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    if name in (OURS, OURS16, REWRITTEN):
        precision = "bfloat16" if name == OURS16 else "float32"
        run = saved_model(f"{folder}/{size}-{precision}/1", "serving_default", told, name == REWRITTEN)
        pixels = image(height, width)
        call = lambda: run(pixels)  # noqa: E731
    elif name in (TORCH, TORCH16):
        call = torchvision(height, width, name == TORCH16)
    elif name == HUB:
        call = kerashub(height, width)
    elif name == AFTER:
        call = after_heads(height, width)
    else:
        call = product(name == PRODUCT16)
    for _ in range(WARM_UP):
        call()
    tell(**told)
    while sys.stdin.readline():
        start = time.perf_counter()
        call()
        tell(seconds=time.perf_counter() - start)


def warm(folder, size):
    """In a process of its own: the warm-up requests as TF Serving sends them, then a hundred of each signature."""
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    path = f"{folder}/{size}-float32/1"
    for signature in ("serving_default", "serving_bytes"):
        run = saved_model(path, signature, {})
        request = None
        for record in tf.compat.v1.io.tf_record_iterator(f"{path}/assets.extra/tf_serving_warmup_requests"):
            log = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
            if log.model_spec.signature_name == signature:
                (value,) = log.inputs.values()
                request = tf.make_ndarray(value)
                run(request)
        seconds = []
        for _ in range(100):
            start = time.perf_counter()
            run(request)
            seconds.append(time.perf_counter() - start)
        tell(signature=signature, second=seconds[1], hundredth=statistics.median(seconds[90:]))


def throughput(folder, size):
    """In a process of its own: milliseconds an image in batches, and with as many requests at once as there are cores.

    BENCHMARK_THREADS are the threads that one operation may use.
    """
    import numpy as np

    run = saved_model(f"{folder}/{size}-float32/1", "serving_default", {})
    pixels = image(*map(int, size.split("x")))
    clients = os.cpu_count()
    with ThreadPoolExecutor(clients) as pool:
        for batch, at_once in ((1, 1), (2, 1), (4, 1), (8, 1), (1, clients)):
            images = np.repeat(pixels, batch, 0)
            seconds = []
            for turn in range(6):
                start = time.perf_counter()
                list(pool.map(lambda _, images=images: run(images), range(at_once)))
                if turn:  # the first sets up
                    seconds.append((time.perf_counter() - start) / (batch * at_once))
            tell(batch=batch, at_once=at_once, ms=1000 * statistics.median(seconds))


def alone(*arguments):
    """All messages of a process that ends by itself."""
    process, messages = Process(__file__, *arguments), []
    while (message := process.hear()) is not None:
        messages.append(message)
    said = process.last_errors()
    process.end()
    if not messages:
        raise RuntimeError(f"{arguments} failed:\n{said}")
    return messages


def compare(size, folder, rounds, torch):
    """{subject: list of seconds} of those that run here, and {subject: what it told at its start}."""
    print(f"{size}: starting ...", end=" ", flush=True)
    processes, started = {}, {}
    names = [OURS, OURS16, REWRITTEN, HUB, TORCH, TORCH16, PRODUCT, PRODUCT16, AFTER]
    if not runtime.cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        names = [name for name in names if name not in BFLOAT16]
    try:
        for name in names:
            python = torch if name in (TORCH, TORCH16) else sys.executable
            variables = {runtime.SWITCH: "off"} if name in PEERS else {}
            process = Process(__file__, name, size, folder, python=python, **variables)
            started[name] = process.hear()
            if started[name] is None:
                said = process.last_errors()
                process.end()
                if name not in (TORCH, TORCH16):
                    raise RuntimeError(f"{name} ended early:\n{said}")
                print(f"\n{name} is skipped: {said.strip().splitlines()[-1]}")
                continue
            processes[name] = process
        seconds = {name: [] for name in processes}
        for _ in range(rounds):
            for name, process in processes.items():
                seconds[name].append(process.go_on()["seconds"])
            print(".", end="", flush=True)
        print(" done", flush=True)
        return seconds, started
    finally:
        for process in processes.values():
            process.end()


def main():
    if sys.argv[1:2] == ["--child"]:
        kind, *rest = sys.argv[2:]
        runtime.set_up(runtime.OTHER)
        return {"exports": write_exports, "warm": warm, "throughput": throughput}.get(
            kind, lambda *rest: subject(kind, *rest)
        )(*rest)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", default=".venv-backends/bin/python", help="a Python with torch and torchvision")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every subject (default: all cores)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", nargs="+", default=SIZES, help="height x width (default %(default)s)")
    args = parser.parse_args()
    os.environ["BENCHMARK_THREADS"] = str(args.threads)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)

    runtime.set_up(runtime.OTHER)
    print(runtime.processor())
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        (told,) = alone("exports", folder, ",".join(args.size))
        missed += judge("bytes of the export / float32 weights", told["float32"] / told["weights"], DISK)
        for size in args.size:
            seconds, started = compare(size, folder, args.rounds, args.torch)
            median = {name: statistics.median(values) for name, values in seconds.items()}
            for name, value in median.items():
                rate = f"  {2 * 2048**3 / value / 1e9:6.0f} GFLOP/s" if name in (PRODUCT, PRODUCT16) else ""
                print(f"  {name:26} {1000 * value:8.1f} ms{rate}")
            # Each turn's floor is at that turn's rate: the machine's speed changes while it runs.
            floors = {
                name: [told[size] / (2 * 2048**3) * value for value in seconds[name]]
                for name in (PRODUCT, PRODUCT16)
                if name in seconds
            }
            for name, values in floors.items():
                print(f"  floor by {name}: {told[size] / 1e9:.1f} GFLOP, {statistics.median(values):.3f} s")

            def ratio(one, others):
                return statistics.median(a / b for a, b in zip(one, others, strict=True))

            ours, half = seconds[OURS], seconds.get(OURS16)
            missed += judge(f"{size}: load, s", started[OURS]["load"], LOAD)
            peers = [name for name in (HUB, TORCH) if name in seconds]
            better = min(peers, key=median.get)
            missed += judge(f"{size}: ours / {better}", ratio(ours, seconds[better]), PEER.get(size, 1.0))
            missed += judge(f"{size}: ours / floor", ratio(ours, floors[PRODUCT]), FLOOR)
            if half:
                missed += judge(f"{size}: bfloat16 / float32, ours", ratio(half, ours), HALF)
            if half and TORCH16 in seconds:
                missed += judge(f"{size}: ours / torchvision, bfloat16", ratio(half, seconds[TORCH16]), TORCH_HALF)
            if size == SIZES[-1]:
                missed += judge(f"{size}: after the heads / all", ratio(seconds[AFTER], ours), AFTER_PART)
        print("batches and requests at once, float32:")
        for threads in dict.fromkeys((1, args.threads)):
            os.environ["BENCHMARK_THREADS"] = str(threads)
            for message in alone("throughput", folder, args.size[0]):
                print(f"  {args.size[0]}, threads {threads}, batch {message['batch']}, {message['at_once']} at once: "
                      f"{message['ms']:.0f} ms an image", flush=True)  # fmt: skip
        os.environ["BENCHMARK_THREADS"] = str(args.threads)
        for message in alone("warm", folder, args.size[0]):
            second = message["second"] / message["hundredth"]
            missed += judge(f"{message['signature']}: second request / hundredth, warmed", second, SECOND)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
