"""Train a RetinaNet on some replicas for some steps, as a process of its own: strategies of two sizes do not share one.

    python tests/replicas.py '{"replicas": 2, ...}' weights.npz

prints what it counted as JSON, and writes all variables before and after.

Convolutions add up in another order for a batch of another size. A ReLU whose input is within that rounding of 0 may
then open for one split of the batch and not for another, and the weights of the next steps differ by far more than
rounding. With "smooth" the model has no such place, so that what differs is rounding alone. Without "resnet" its
backbone is five convolutions, which are faster to trace.
"""

import json
import os
import sys
import types
from pathlib import Path

import numpy as np

SETTINGS = {
    "replicas": 1, "norm": "frozen", "normalizer": "image", "jit": True, "steps": 10, "width": 16, "fpn_channels": 32,
    "head_depth": 1, "resnet": True, "learning_rate": 0.02, "clip_norm": 1.0, "smooth": False,
    "weighted": False, "dump": None,
}  # fmt: skip


def batches(steps, batch_size=16):
    """Landscape and portrait by turns; 0 to 5 boxes an image, in each batch an image without any; weights 0 to 2."""
    rng = np.random.default_rng(1)
    for step in range(steps):
        height, width = ((96, 64), (64, 96))[step % 2]
        boxes, labels = np.zeros((batch_size, 5, 4), "float32"), np.full((batch_size, 5), -1)
        for i in range(batch_size):
            n = (i + step) % 6
            corner = rng.uniform(0, 40, (n, 2))
            boxes[i, :n] = np.concatenate([corner, corner + rng.uniform(8, 50, (n, 2))], axis=1)
            labels[i, :n] = rng.integers(0, 3, n)
        images = rng.integers(0, 256, (batch_size, height, width, 3), "uint8")
        yield images, {"boxes": boxes, "labels": labels}, np.linspace(0, 2, batch_size, dtype="float32")


def without_thresholds():
    """Put SiLU for ReLU and average for maximum pooling: the gradient becomes a continuous function of the weights.

    The losses' gradients are continuous as they are, and targets do not depend on the weights.
    """
    import keras

    from retinanet_keras import pyramid, subnets

    smooth = types.SimpleNamespace(**{**vars(keras.ops), "relu": keras.ops.silu})
    subnets.ops, pyramid.keras = smooth, types.SimpleNamespace(**{**vars(keras), "ops": smooth})
    keras.layers.ReLU.call = lambda self, x: keras.ops.silu(x)
    keras.layers.MaxPooling2D.call = lambda self, x: keras.ops.average_pool(x, self.pool_size, self.strides)


def main(settings, out):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if settings["dump"]:
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={settings['dump']} --xla_dump_hlo_as_text"
    import keras
    import tensorflow as tf
    from conftest import five_convolutions

    from retinanet_keras import RetinaNet, optimizers
    from retinanet_keras.config import StrategyConfig, TrainConfig
    from retinanet_keras.training import strategies

    if settings["smooth"]:
        without_thresholds()
    traces = []
    original = RetinaNet.loss_terms

    def counting(*args):  # Python runs it when it traces
        traces.append(args)
        return original(*args)

    RetinaNet.loss_terms = counting
    strategy = strategies.make(StrategyConfig(kind="mirrored", replicas=settings["replicas"]), 16)
    # The rate drops on the way, and the gradient is clipped where it is above "clip_norm".
    train = TrainConfig(
        learning_rate=settings["learning_rate"], warmup=2, drops=(7,), clip_norm=settings["clip_norm"],
        iterations=settings["steps"],
    )  # fmt: skip
    keras.utils.set_random_seed(0)
    with strategy.scope():
        backbone, of_resnet = "resnet18", {"width": settings["width"], "norm": settings["norm"]}
        if not settings["resnet"]:
            backbone, of_resnet = five_convolutions(activation="silu" if settings["smooth"] else "relu"), {}
        model = RetinaNet(
            3, backbone, fpn_channels=settings["fpn_channels"], head_depth=settings["head_depth"], **of_resnet
        )
        for layer in model.backbone.layers:
            if layer.name.endswith("_conv2_norm"):  # else each residual block would double the variance
                layer.gamma.assign(0.2 * layer.gamma)
        model.compile(
            optimizers.build(train), normalizer=settings["normalizer"], jit_compile=settings["jit"], check_finite=True
        )
    before = {f"before{i}": v.numpy() for i, v in enumerate(model.trainable_variables)}
    spec = (
        tf.TensorSpec((16, None, None, 3), tf.uint8),
        {"boxes": tf.TensorSpec((16, 5, 4)), "labels": tf.TensorSpec((16, 5), tf.int64)},
        tf.TensorSpec((16,)),
    )
    data = tf.data.Dataset.from_generator(lambda: batches(settings["steps"]), output_signature=spec)
    if not settings["weighted"]:
        data = data.map(lambda images, truth, _: (images, truth))
    norms = []
    each = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: norms.append(float(logs["gradient_norm"]))
    )
    history = model.fit(data, steps_per_epoch=settings["steps"], verbose=0, callbacks=[each]).history
    after = {f"after{i}": v.numpy() for i, v in enumerate(model.trainable_variables)}
    np.savez(out, **before, **after)
    logs = {name: values[-1] for name, values in history.items()}
    print(json.dumps({"traces": len(traces), "norms": norms, "logs": logs}))


if __name__ == "__main__":
    main({**SETTINGS, **json.loads(sys.argv[1])}, Path(sys.argv[2]))
