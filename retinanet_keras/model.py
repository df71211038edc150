"""RetinaNet as a Keras model: pixels to logits and deltas (§4), the loss of §4.1, and detections.

Compile, fit, evaluate, predict, save and load work as for any Keras model. On TensorFlow the model has its own train
step, which keeps forward pass, loss and gradients in one XLA function per replica, and everything that crosses replicas
outside it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from typing import Any

import keras
from keras import ops

from retinanet_keras import backbone as backbones
from retinanet_keras import detections, fit_arguments, keras_hooks, losses, objective
from retinanet_keras.anchors import anchor_boxes, level_sizes
from retinanet_keras.config import AnchorConfig, DetectionConfig, MiningConfig, TargetConfig
from retinanet_keras.pyramid import FeaturePyramid, LastLayer
from retinanet_keras.subnets import Subnet
from retinanet_keras.tensors import Size, Tensor, round_up
from retinanet_keras.weights import imagenet, keras_files

PAD_COLOR = tuple(round(mean) for mean in backbones.MEAN)  # RGB; about zero after normalization
SIZE_MULTIPLE = 32  # C5's stride: every level divides evenly


@keras.saving.register_keras_serializable("retinanet_keras")
class RetinaNet(keras.Model):
    """The detector of §4: a ResNet, a feature pyramid, and a classification and a box regression subnet.

    Args:
        num_classes: int. Number of object classes, K.
        backbone: str or keras.Model. "resnet18", "resnet50", "resnet101", "resnet152" or "resnext101_32x8d"; or a
            Keras model with its own weights, see `backbone.of_keras_model`, to which the settings of ResNets do not
            apply.
        weights: str, path or None. Weights of the backbone: "imagenet", or a file of `save_weights`; None: random.
        anchors: AnchorConfig. Sizes, scales and ratios of the anchors; levels "last" also removes the pyramid.
        targets: TargetConfig. How anchors are matched to ground truth.
        detection: DetectionConfig. Thresholds and limits of inference.
        fpn_channels: int. Channels of the pyramid and of the subnets.
        head_depth: int. Convolutions in a subnet before its last.
        prior: float. Initial foreground probability of every anchor, pi of §4.1.
        norm: str or None. Normalization in the ResNet: "frozen", "batch" or "group"; None: "frozen" with pre-trained
            weights, else "group", as frozen batch normalization cannot be trained from random weights.
        width: int. Channels of the ResNet's stem.
        freeze_at: int or None. Number of ResNet stages that are not trained; None: 2 (the stem and res2) with
            pre-trained weights, else 0.
        stride_in: str or None. The convolution of a stage's first block that has the stride, see `backbone.resnet`.
        norm_epsilon: float. Epsilon of the ResNet's batch normalization.
        p6_source: str. "c5" or "p5", see `FeaturePyramid`.
        head_norm: str or None. Normalization in the subnets: None or "group", see `Subnet`.
        pixel_mean: tuple of 3 floats, RGB, of 0..255, or None. Pixels become (pixel - mean) / std; None: the mean that
            belongs to `weights`.
        pixel_std: tuple of 3 floats, RGB, or None. None: that of ImageNet.
        categories: list of dicts {"label", "id", "name"}, or None. Categories of the dataset, stored in files and
            exports.
        dtype: str or keras.DTypePolicy. Policy of all layers, such as "mixed_bfloat16"; outputs and losses are float32
            with any.

    Call arguments:
        images: tensor [B, H, W, 3], uint8 or float. RGB pixels of 0..255.
        training: bool. Whether batch normalization that is trained uses the statistics of the batch.

    Returns:
        dict of "logits" [B, A, K] and "deltas" [B, A, 4] (dx, dy, dw, dh), float32. A is the number of anchors of the
        size padded to multiples of 32.

    Example:

    ```python
    import numpy as np

    from retinanet_keras import RetinaNet

    model = RetinaNet(num_classes=3, backbone="resnet18", width=8, fpn_channels=16, head_depth=1)
    model.compile(optimizer="sgd")

    images = np.random.randint(0, 256, (2, 64, 96, 3), "uint8")
    truth = {
        "boxes": np.array([[[8, 8, 40, 40]], [[0, 0, 0, 0]]], "float32"),  # x1, y1, x2, y2; the second image has none
        "labels": np.array([[2], [-1]]),
    }
    model.fit(images, truth, batch_size=2)
    detections = model.detect(images)  # boxes [2, 100, 4], scores [2, 100], labels [2, 100], count [2]
    ```
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str | keras.Model = "resnet50",
        *,
        weights: str | PathLike | None = None,
        anchors: AnchorConfig = AnchorConfig(),  # noqa: B008 (frozen)
        targets: TargetConfig = TargetConfig(),  # noqa: B008
        detection: DetectionConfig = DetectionConfig(),  # noqa: B008
        fpn_channels: int = 256,
        head_depth: int = 4,
        prior: float = 0.01,
        norm: str | None = None,
        width: int = 64,
        freeze_at: int | None = None,
        stride_in: str | None = None,
        norm_epsilon: float = backbones.EPSILON,
        p6_source: str = "c5",
        head_norm: str | None = None,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        categories: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes: expected a whole number of at least 1, got {num_classes!r}")
        self.num_classes = num_classes
        self.anchors, self.targets, self.detection = anchors, targets, detection
        self.categories = categories
        self.pixel_std = tuple(pixel_std or backbones.STD)
        self.builtin_backbone = not isinstance(backbone, keras.Model)
        if not self.builtin_backbone:
            if weights or norm or freeze_at or stride_in:
                raise ValueError(
                    "weights, norm, freeze_at and stride_in apply only to the built-in ResNets, and backbone is a "
                    "Keras model with its own weights. Leave them out, and freeze its layers by their `trainable`"
                )
            self.backbone = backbones.of_keras_model(backbone)
        else:
            norm = norm or ("frozen" if weights else "group")
            freeze_at = (2 if weights else 0) if freeze_at is None else freeze_at
            with _dtype_policy(self.dtype_policy):
                self.backbone = backbones.resnet(
                    backbone, width=width, norm=norm, stride_in=stride_in, epsilon=norm_epsilon
                )
            mean_of_weights = imagenet.load(self.backbone, weights, self.pixel_std) if weights else None
            pixel_mean = pixel_mean or mean_of_weights
            backbones.freeze(self.backbone, freeze_at)
        self.pixel_mean = tuple(pixel_mean or backbones.MEAN)
        self._settings = {
            "num_classes": num_classes, "backbone": backbone, "fpn_channels": fpn_channels, "head_depth": head_depth,
            "prior": prior, "norm": norm, "width": width, "freeze_at": freeze_at, "stride_in": stride_in,
            "norm_epsilon": norm_epsilon, "p6_source": p6_source, "head_norm": head_norm,
            "pixel_mean": self.pixel_mean, "pixel_std": self.pixel_std, "categories": categories,
        }  # fmt: skip
        head: dict[str, Any] = {
            "per_cell": anchors.per_cell,
            "channels": fpn_channels,
            "depth": head_depth,
            "norm": head_norm,
        }
        with _dtype_policy(self.dtype_policy):
            if anchors.levels == "last":
                self.pyramid = LastLayer(fpn_channels, name="pyramid")
            else:
                self.pyramid = FeaturePyramid(fpn_channels, p6_source, name="pyramid")
            self.class_subnet = Subnet(values=num_classes, prior=prior, name="class_subnet", **head)
            self.box_subnet = Subnet(values=4, name="box_subnet", **head)
        self.classification_tracker = keras.metrics.Mean("classification_loss")
        self.box_tracker = keras.metrics.Mean("box_loss")
        self.positives_tracker = keras.metrics.Mean("positives")
        self._detect_graph: Callable[..., dict[str, Tensor]] | None = None
        self.evaluation_graphs: tuple[Callable, Callable] | None = None  # of evaluation/detect.py
        self.build((None, None, None, 3))

    built: bool

    def build(self, input_shape: Any) -> None:
        """Create all weights, which do not depend on the size of images."""
        if self.built:
            return
        self.pyramid.build({name: tensor.shape for name, tensor in self.backbone.output.items()})
        levels = [(None, None, None, self.pyramid.channels)]
        self.class_subnet.build(levels)
        self.box_subnet.build(levels)
        self.built = True

    def call(self, images: Tensor, training: bool = False) -> dict[str, Tensor]:
        return self._forward(self.normalize(images), training)

    def _forward(self, x: Tensor, training: bool) -> dict[str, Tensor]:
        levels = self.pyramid(self.backbone(ops.cast(x, self.compute_dtype), training=training))
        return {"logits": self.class_subnet(levels), "deltas": self.box_subnet(levels)}

    # Training

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "sgd",
        classification_loss: Any = None,
        box_loss: Any = None,
        *,
        box_weight: float = 1.0,
        normalizer: str = "image",
        mining: MiningConfig | dict[str, Any] | None = None,
        jit_compile: bool | str = "auto",
        check_finite: bool = False,
        **kwargs: Any,
    ) -> None:
        """Configure training. On several replicas a step is that of one device with the same global batch.

        Batch normalization that is trained would have separate statistics on each replica, so `fit` rejects it there.

        Args:
            optimizer: str or keras.optimizers.Optimizer.
            classification_loss: str, function or keras.losses.Loss, called (0/1 targets, logits), element-wise. None:
                `losses.FocalLoss()`, the paper's.
            box_loss: str, function or keras.losses.Loss, called (target deltas, deltas), element-wise. None:
                `losses.SmoothL1Loss()`.
            box_weight: float. Weight of the box loss in the sum.
            normalizer: str. "image", each image's loss is divided by its own number of positive anchors (§4.1), then
                averaged; "minibatch", the sum is divided by the sum of positives + 1, counted as Detectron does.
            mining: MiningConfig, dict of its values, or None. Only the hardest anchors of each image contribute to its
                classification loss (§5.1); the box loss and the normalizer stay those of all anchors. None: all
                anchors contribute.
            jit_compile: bool or "auto". Compile forward pass, loss and gradients with XLA; "auto": where there is a
                GPU.
            check_finite: bool. Stop a step whose loss or gradient is not finite before it changes anything, with
                TensorFlow's InvalidArgumentError. On TensorFlow only.
            **kwargs: `run_eagerly`, `steps_per_execution` and `auto_scale_loss` of `keras.Model.compile`.

        Raises:
            ValueError: If an argument has a value that is not listed here, or one of Keras's `loss`, `loss_weights`,
                `metrics` and `weighted_metrics` is given.
        """
        fit_arguments.check_compile(kwargs)
        if jit_compile is True and kwargs.get("run_eagerly"):
            raise ValueError('jit_compile: expected False or "auto" with run_eagerly=True, got True')
        if normalizer not in ("image", "minibatch"):
            raise ValueError(f'normalizer: expected "image" or "minibatch", got {normalizer!r}')
        self.classification_loss = losses.get(classification_loss) or losses.FocalLoss()
        self.box_loss = losses.get(box_loss) or losses.SmoothL1Loss()
        self.box_weight, self.normalizer, self.jit_step = box_weight, normalizer, jit_compile
        mining = MiningConfig(**mining) if isinstance(mining, dict) else mining
        self.mining = mining if mining and mining.batch_size else None
        self.check_finite = check_finite
        self._gradients: Callable[..., Any] | None = None
        on_tensorflow = keras.backend.backend() == "tensorflow"
        # Keras would wrap the whole of a distributed step in XLA, which fails; `_gradients` is what is compiled.
        super().compile(optimizer=optimizer, jit_compile=False if on_tensorflow else jit_compile, **kwargs)
        if on_tensorflow:
            from retinanet_keras import train_step

            train_step.prepare(self)

    def get_compile_config(self) -> dict[str, Any] | None:
        if not self.compiled:
            return None
        config = {
            "optimizer": self.optimizer, "classification_loss": self.classification_loss, "box_loss": self.box_loss,
            "box_weight": self.box_weight, "normalizer": self.normalizer, "jit_compile": self.jit_step,
            "mining": self.mining and dataclasses.asdict(self.mining), "check_finite": self.check_finite,
            "run_eagerly": self.run_eagerly, "steps_per_execution": self.steps_per_execution,
        }  # fmt: skip
        return keras.saving.serialize_keras_object(config)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # The optimizer was saved with its loss scaling, if it had any.
        self.compile(**keras.saving.deserialize_keras_object(config), auto_scale_loss=False)
        self.optimizer.build(self.trainable_variables)

    @functools.wraps(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        fit_arguments.check_class_weight(super().fit, args, kwargs)
        return super().fit(*args, **kwargs)

    @functools.wraps(keras.Model.train_on_batch)
    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        fit_arguments.check_class_weight(super().train_on_batch, args, kwargs)
        return super().train_on_batch(*args, **kwargs)

    def loss_terms(
        self, images: Tensor, truth: dict[str, Tensor], outputs: dict[str, Tensor], sample_weight: Any = None
    ) -> objective.LossTerms:
        """`objective.loss_terms` of a batch of images, with the settings of `compile`.

        Args:
            images: tensor [B, H, W, 3].
            truth: dict of boxes [B, N, 4] and labels [B, N].
            outputs: dict of logits [B, A, K] and deltas [B, A, 4], as `call` returns them.
            sample_weight: tensor [B], dict of labels [B] and boxes [B], or None. Factor of each image's loss, or
                factors of its classification and its box loss. The divisor does not depend on it, as in Keras.

        Returns:
            objective.LossTerms of the batch.
        """
        return objective.loss_terms(
            outputs, truth["boxes"], truth["labels"], self._anchors_of(images, SIZE_MULTIPLE)[0],
            target_config=self.targets, classification_loss=self.classification_loss, box_loss=self.box_loss,
            normalizer=self.normalizer, mining_config=self.mining,
            image_weights=fit_arguments.image_weights(sample_weight, truth["labels"].shape[0]),
        )  # fmt: skip

    def compute_loss(
        self,
        x: Tensor = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """The loss of one batch, float32 scalar; used by Keras's own train and test steps on other backends."""
        terms = self.loss_terms(x, y, y_pred, sample_weight)
        self._track(terms)
        return terms.weighted_sum(self.box_weight) / terms.divisor

    def train_step(self, *args: Any) -> Any:
        """One step; on TensorFlow that of `train_step.py`, of (images, truth) or (images, truth, sample_weight)."""
        if keras.backend.backend() != "tensorflow":
            return super().train_step(*args)
        from retinanet_keras import train_step

        images, truth, sample_weight = keras.utils.unpack_x_y_sample_weight(args[0])
        if self._gradients is None:
            self._gradients = train_step.gradient_function(self, self.jit_step)
        before = train_step.moving_statistics(self) if self.check_finite else None
        terms, gradients = self._gradients(images, truth["boxes"], truth["labels"], sample_weight)
        terms, norm = train_step.update(self, terms, gradients, before)
        return self._logs(terms, gradient_norm=norm)

    def test_step(self, *args: Any) -> Any:
        """`evaluate` on TensorFlow: Keras's would multiply the loss by the number of replicas."""
        if keras.backend.backend() != "tensorflow":
            return super().test_step(*args)
        images, truth, sample_weight = keras.utils.unpack_x_y_sample_weight(args[0])
        return self._logs(self.loss_terms(images, truth, self(images, training=False), sample_weight))

    def _logs(self, terms: objective.LossTerms, **others: Tensor) -> dict[str, Tensor]:
        """Add the terms of some images to the metrics, and return what to log of all so far."""
        import tensorflow as tf

        self._track(terms)
        loss = terms.weighted_sum(self.box_weight) / terms.divisor
        keras_hooks.loss_tracker(self).update_state(loss, sample_weight=terms.divisor)
        logs = {**self.get_metrics_result(), **others}
        if isinstance(self.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy):
            logs = {name: tf.reshape(value, (1,)) for name, value in logs.items()}  # Keras averages them over axis 0
        return logs

    def _track(self, terms: objective.LossTerms) -> None:
        divisor, images = terms.divisor, terms.images
        self.classification_tracker.update_state(terms.classification / divisor, sample_weight=divisor)
        self.box_tracker.update_state(terms.box / divisor, sample_weight=divisor)
        self.positives_tracker.update_state(terms.positives / images, sample_weight=images)

    _maybe_symbolic_build = keras_hooks.build_optimizer_only

    # Inference

    def detect(self, images: Tensor, sizes: Tensor = None) -> dict[str, Tensor]:
        """Detect objects in images as they are: nothing is resized.

        Args:
            images: tensor [B, H, W, 3], uint8 or float. RGB pixels of 0..255.
            sizes: tensor [B, 2], or None. Height and width of each image before padding, to which boxes are clipped;
                None: H and W.

        Returns:
            dict of boxes float32 [B, D, 4] in absolute pixels x1, y1, x2, y2, scores float32 [B, D] in descending
            order, labels int32 [B, D], count int32 [B]; D = `detection.max_detections`. Rows past count: box 0, score
            0, label -1.
        """
        images = ops.convert_to_tensor(images)
        _check_images(images)
        if sizes is None:
            sizes = _unpadded_sizes(images)
        if keras.backend.backend() != "tensorflow":
            return self._detect_in_graph(images, sizes)
        import tensorflow as tf

        if self._detect_graph is None:
            self._detect_graph = tf.function(self._detect_in_graph, reduce_retracing=True, autograph=False)
        return self._detect_graph(images, tf.cast(sizes, tf.float32))

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: str | int = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """Keras's `predict`, which fails on an empty array; here an empty array has no detections."""
        if getattr(x, "shape", None) and x.shape[0] == 0:
            return self.predict_on_batch(x)
        return super().predict(x, batch_size, verbose, steps, callbacks)

    def predict_step(self, *args: Any) -> Any:
        """One batch of `predict`, which returns the dict of `detect`."""
        images, truth, _ = keras.utils.unpack_x_y_sample_weight(args[-1])
        _check_images(images)
        sizes = truth["size"] if truth and "size" in truth else _unpadded_sizes(images)
        if keras.backend.backend() != "jax":
            return self._detect_in_graph(images, sizes)
        trained, others = args[0]  # JAX passes the variables' values
        values = zip([*self.trainable_variables, *self.non_trainable_variables], [*trained, *others], strict=True)
        with keras.StatelessScope(state_mapping=list(values)):
            return self._detect_in_graph(images, sizes), others

    def _detect_in_graph(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """`detect` without its own compilation, for use in a larger graph."""

        def detect(images, sizes):
            return self._decode_in_graph(self._outputs_in_graph(images, sizes), images, sizes)

        return detections.for_any_batch(detect)(images, sizes)

    def _outputs_in_graph(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """The first half of `_detect_in_graph`: logits and deltas; pixels beyond an image's size are padding."""
        pixels = self.normalize(images, self.detection.pad_multiple, ops.cast(sizes, "float32"))
        return self._forward(pixels, False)

    def _decode_in_graph(self, outputs: dict[str, Tensor], images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """The second half of `_detect_in_graph`: detections from the outputs of the first, and its arguments."""
        settings = dataclasses.asdict(self.detection)
        anchors, per_level = self._anchors_of(images, settings.pop("pad_multiple"))
        sizes = ops.cast(sizes, "float32")
        return detections.decode(
            outputs["logits"], outputs["deltas"], anchors, per_level, sizes[:, 0], sizes[:, 1], **settings
        )

    def normalize(self, images: Tensor, multiple: int = SIZE_MULTIPLE, sizes: Tensor = None) -> Tensor:
        """Turn pixels into network input: (RGB - mean) / std, padded with 0 at the right and the bottom.

        Args:
            images: tensor [B, H, W, 3] of any dtype. RGB pixels of 0..255.
            multiple: int. The padded height and width are multiples of it.
            sizes: float32 tensor [B, 2], or None. Height and width of each image; what is beyond them becomes padding,
                too.

        Returns:
            float32 tensor [B, H', W', 3].
        """
        height, width = ops.shape(images)[1:3]
        mean, std = (ops.convert_to_tensor([float(v) for v in values]) for values in (self.pixel_mean, self.pixel_std))
        x = (ops.cast(images, "float32") - mean) / std
        if sizes is not None:
            rows, columns = (ops.cast(ops.arange(side), "float32") for side in (height, width))
            in_height = rows[None, :, None] < sizes[:, :1, None]  # [B, H, 1]
            in_width = columns[None, None] < sizes[:, 1:, None]  # [B, 1, W]
            x = ops.where((in_height & in_width)[..., None], x, 0.0)
        bottom, right = (round_up(side, multiple) - side for side in (height, width))
        if not (isinstance(bottom, int) and isinstance(right, int) and bottom == right == 0):
            x = ops.pad(x, [[0, 0], [0, bottom], [0, right], [0, 0]])
        return x

    def _anchors_of(self, images: Tensor, multiple: int) -> tuple[Tensor, list[Size]]:
        """(anchors [A, 4], anchors per level) of a batch, padded to a multiple."""
        height, width = (round_up(side, multiple) for side in ops.shape(images)[1:3])
        return anchor_boxes(height, width, self.anchors), level_sizes(height, width, self.anchors)

    # Saving

    @functools.wraps(keras.Model.save)
    def save(self, filepath: str | PathLike, overwrite: bool = True, zipped: bool | None = None, **kwargs: Any) -> None:
        if overwrite or keras_files.may_replace(filepath):
            with keras_files.replacing(filepath) as path:
                super().save(path, zipped=zipped, **kwargs)

    @functools.wraps(keras.Model.save_weights)
    def save_weights(
        self, filepath: str | PathLike, overwrite: bool = True, max_shard_size: float | None = None
    ) -> None:
        if max_shard_size is not None:  # several files
            super().save_weights(filepath, overwrite, max_shard_size)
        elif overwrite or keras_files.may_replace(filepath):
            with keras_files.replacing(filepath) as path:
                super().save_weights(path)

    @functools.wraps(keras.Model.load_weights)
    def load_weights(self, filepath: str | PathLike, skip_mismatch: bool = False, **kwargs: Any) -> None:
        keras_files.check(filepath)
        super().load_weights(filepath, skip_mismatch, **kwargs)

    def load_own_variables(self, store: Any) -> None:
        keras_files.check_store(store)
        super().load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """All settings; not `weights`, so a reloaded model does not download pre-trained ones again."""
        settings = {name: dataclasses.asdict(getattr(self, name)) for name in ("anchors", "targets", "detection")}
        if isinstance(self._settings["backbone"], keras.Model):
            settings["backbone"] = keras.saving.serialize_keras_object(self.backbone)
        return {**super().get_config(), **self._settings, **settings}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RetinaNet":
        kinds = {"anchors": AnchorConfig, "targets": TargetConfig, "detection": DetectionConfig}
        settings: dict[str, Any] = {}
        if isinstance(config["backbone"], dict):
            settings["backbone"] = keras.saving.deserialize_keras_object(config["backbone"])
        for name, kind in kinds.items():
            values = dict(config[name])
            settings[name] = kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
        return cls(**{**config, **settings})


@contextlib.contextmanager
def _dtype_policy(policy: keras.DTypePolicy) -> Iterator[None]:
    """A context in which new layers have this dtype policy, layers inside other layers included."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _check_images(images: Tensor) -> None:
    if len(images.shape) != 4 or images.shape[-1] != 3 or 0 in images.shape[1:3]:
        raise ValueError(
            f"images: expected RGB images [B, H, W, 3] of at least one pixel, got shape {tuple(images.shape)}. Add the "
            "batch axis to a single image, and convert grayscale to RGB"
        )


def _unpadded_sizes(images: Tensor) -> Tensor:
    """Height and width of every image of a batch without padding, int [B, 2]."""
    batch, height, width = ops.shape(images)[:3]
    return ops.tile(ops.stack([height, width])[None], (batch, 1))
