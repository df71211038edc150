"""RetinaNet as a Keras model: pixels to logits and deltas (§4), the loss of §4.1, and detections.

Compile, fit, evaluate, predict, save and load work as for any Keras model. On TensorFlow a train step of its own keeps
forward, loss and gradients in one XLA function per replica, and everything that crosses replicas outside it.
"""

import contextlib
import dataclasses
import functools

import keras
from keras import ops

from retinanet_keras import backbone as backbones
from retinanet_keras import detections, fit_arguments, losses, objective
from retinanet_keras.anchors import anchor_boxes, level_sizes
from retinanet_keras.config import AnchorConfig, DetectionConfig, MiningConfig, TargetConfig
from retinanet_keras.pyramid import FeaturePyramid, LastLayer
from retinanet_keras.subnets import Subnet
from retinanet_keras.weights import imagenet, keras_files

PAD_COLOR = tuple(round(mean) for mean in backbones.MEAN)  # RGB; about zero after normalization
SIZE_MULTIPLE = 32  # C5's stride: every level divides evenly


@keras.saving.register_keras_serializable("retinanet_keras")
class RetinaNet(keras.Model):
    """The detector of §4.

    Call: RGB images [B, H, W, 3] of 0..255, uint8 or float -> {"logits": [B, A, K], "deltas": [B, A, 4]}, float32, A
    the anchors of the size padded to multiples of 32.

    Args:
        num_classes: K.
        backbone: "resnet18", "resnet50", "resnet101", "resnet152" or "resnext101_32x8d"; or a Keras model of its own
            weights, see `backbone.of_keras_model`, to which the settings of ResNets do not apply.
        weights: of the backbone: None for random ones, "imagenet", or a file of `save_weights`.
        anchors, targets, detection: settings of anchors, of their assignment, and of inference; anchors.levels "last"
            also takes the pyramid away.
        fpn_channels: of the pyramid and the subnets.
        head_depth: convs in a subnet before its last.
        prior: initial foreground probability of every anchor, pi of §4.1.
        norm: in the ResNet, "frozen", "batch" or "group"; None: "frozen" with pre-trained weights, else "group", as
            frozen batch normalization cannot be trained from random weights.
        width: channels of the ResNet's stem.
        freeze_at: ResNet stages not trained; None: 2 (the stem and res2) with pre-trained weights, else 0.
        stride_in, norm_epsilon: of the ResNet, see `backbone.resnet`.
        p6_source, head_norm: see `FeaturePyramid` and `Subnet`.
        pixel_mean, pixel_std: RGB, of 0..255; pixels become (pixel - mean) / std. None: those of `weights`.
        categories: list of {"label", "id", "name"}, carried along to files and exports; None for none.
        dtype: a Keras dtype policy, such as "mixed_bfloat16", of all layers; outputs and losses are float32 with any.
    """

    def __init__(
        self, num_classes, backbone="resnet50", *, weights=None, anchors=AnchorConfig(), targets=TargetConfig(),  # noqa: B008
        detection=DetectionConfig(), fpn_channels=256, head_depth=4, prior=0.01, norm=None, width=64, freeze_at=None,  # noqa: B008
        stride_in=None, norm_epsilon=backbones.EPSILON, p6_source="c5", head_norm=None, pixel_mean=None,
        pixel_std=None, categories=None, **kwargs,
    ):  # fmt: skip
        super().__init__(**kwargs)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes: expected a whole number of at least 1, got {num_classes!r}")
        self.num_classes = num_classes
        self.anchors, self.targets, self.detection = anchors, targets, detection
        self.categories = categories
        self.pixel_std = tuple(pixel_std or backbones.STD)
        self.own_backbone = not isinstance(backbone, keras.Model)
        if not self.own_backbone:
            if weights or norm or freeze_at or stride_in:
                raise ValueError(
                    "weights, norm, freeze_at and stride_in are of the ResNets made here; a Keras model given as "
                    "backbone has weights of its own: freeze its layers by their `trainable`"
                )
            self.backbone = backbones.of_keras_model(backbone)
        else:
            norm = norm or ("frozen" if weights else "group")
            freeze_at = (2 if weights else 0) if freeze_at is None else freeze_at
            with _layers_of(self.dtype_policy):
                self.backbone = backbones.resnet(
                    backbone, width=width, norm=norm, stride_in=stride_in, epsilon=norm_epsilon
                )
            own_mean = imagenet.load(self.backbone, weights, self.pixel_std) if weights else None
            pixel_mean = pixel_mean or own_mean
            backbones.freeze(self.backbone, freeze_at)
        self.pixel_mean = tuple(pixel_mean or backbones.MEAN)
        self._settings = {
            "num_classes": num_classes, "backbone": backbone, "fpn_channels": fpn_channels, "head_depth": head_depth,
            "prior": prior, "norm": norm, "width": width, "freeze_at": freeze_at, "stride_in": stride_in,
            "norm_epsilon": norm_epsilon, "p6_source": p6_source, "head_norm": head_norm,
            "pixel_mean": self.pixel_mean, "pixel_std": self.pixel_std, "categories": categories,
        }  # fmt: skip
        head = {"per_cell": anchors.per_cell, "channels": fpn_channels, "depth": head_depth, "norm": head_norm}
        with _layers_of(self.dtype_policy):
            if anchors.levels == "last":
                self.pyramid = LastLayer(fpn_channels, name="pyramid")
            else:
                self.pyramid = FeaturePyramid(fpn_channels, p6_source, name="pyramid")
            self.class_subnet = Subnet(values=num_classes, prior=prior, name="class_subnet", **head)
            self.box_subnet = Subnet(values=4, name="box_subnet", **head)
        self.classification_tracker = keras.metrics.Mean("classification_loss")
        self.box_tracker = keras.metrics.Mean("box_loss")
        self.positives_tracker = keras.metrics.Mean("positives")
        self._detect_graph = self.evaluation_graphs = None
        self.build((None, None, None, 3))

    def build(self, input_shape):
        """All weights exist from the start, whatever sizes of images will come."""
        if self.built:
            return
        self.pyramid.build({name: tensor.shape for name, tensor in self.backbone.output.items()})
        levels = [(None, None, None, self.pyramid.channels)]
        self.class_subnet.build(levels)
        self.box_subnet.build(levels)
        self.built = True

    def call(self, images, training=False):
        return self._forward(self.normalize(images), training)

    def _forward(self, x, training):
        levels = self.pyramid(self.backbone(ops.cast(x, self.compute_dtype), training=training))
        return {"logits": self.class_subnet(levels), "deltas": self.box_subnet(levels)}

    # Training

    def compile(
        self, optimizer="sgd", classification_loss=None, box_loss=None, *, box_weight=1.0, normalizer="image",
        mining=None, jit_compile="auto", check_finite=False, **kwargs,
    ):  # fmt: skip
        """Configure training. Under several replicas the step is that of one device with the same global batch.

        Batch normalization that is trained has statistics of its own on each: `fit` refuses it there.

        Args:
            optimizer: any Keras optimizer, or its name.
            classification_loss: called (0/1 targets, logits), element-wise; None: `losses.FocalLoss()`, the paper's.
            box_loss: called (target deltas, deltas), element-wise; None: `losses.SmoothL1Loss()`.
            box_weight: weight of the box loss in the sum.
            normalizer: "image", each image's loss is divided by its own number of positive anchors (§4.1), then
                averaged; "minibatch", the sum is divided by the sum of positives + 1, counted as Detectron does.
            mining: a MiningConfig, or a dict of one: the classification loss is of each image's hardest anchors only
                (§5.1); the box loss and the normalizer stay those of all. None: of all anchors.
            jit_compile: XLA for forward, loss and gradients; "auto": where there is a GPU.
            check_finite: stop a step whose loss or gradient is not finite before it changes anything, with
                TensorFlow's InvalidArgumentError; there only.
            **kwargs: `run_eagerly`, `steps_per_execution` and `auto_scale_loss` of `keras.Model.compile`.

        Raises:
            ValueError: for its `loss`, `loss_weights`, `metrics` and `weighted_metrics`, naming what to use instead.
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
        self._gradients = None
        on_tensorflow = keras.backend.backend() == "tensorflow"
        # Keras would wrap the whole of a distributed step in XLA, which fails; `_gradients` is what is compiled.
        super().compile(optimizer=optimizer, jit_compile=False if on_tensorflow else jit_compile, **kwargs)
        if on_tensorflow:
            from retinanet_keras import train_step

            train_step.prepare(self)

    def get_compile_config(self):
        if not self.compiled:
            return None
        config = {
            "optimizer": self.optimizer, "classification_loss": self.classification_loss, "box_loss": self.box_loss,
            "box_weight": self.box_weight, "normalizer": self.normalizer, "jit_compile": self.jit_step,
            "mining": self.mining and dataclasses.asdict(self.mining), "check_finite": self.check_finite,
            "run_eagerly": self.run_eagerly, "steps_per_execution": self.steps_per_execution,
        }  # fmt: skip
        return keras.saving.serialize_keras_object(config)

    def compile_from_config(self, config):
        # The optimizer was saved with its loss scaling, if it had any.
        self.compile(**keras.saving.deserialize_keras_object(config), auto_scale_loss=False)
        self.optimizer.build(self.trainable_variables)

    @functools.wraps(keras.Model.fit)
    def fit(self, *args, **kwargs):
        fit_arguments.check_class_weight(super().fit, args, kwargs)
        return super().fit(*args, **kwargs)

    @functools.wraps(keras.Model.train_on_batch)
    def train_on_batch(self, *args, **kwargs):
        fit_arguments.check_class_weight(super().train_on_batch, args, kwargs)
        return super().train_on_batch(*args, **kwargs)

    def loss_terms(self, images, truth, outputs, sample_weight=None):
        """`objective.loss_terms` of a batch of images as compiled.

        Args:
            truth: dict of boxes [B, N, 4] and labels [B, N].
            sample_weight: factor of each image's loss, [B], or a dict of labels [B] and boxes [B], factors of its
                classification and its box loss. The divisor does not depend on it, as in Keras. None: 1.
        """
        return objective.loss_terms(
            outputs, truth["boxes"], truth["labels"], self._anchors_of(images, SIZE_MULTIPLE)[0],
            target_config=self.targets, classification_loss=self.classification_loss, box_loss=self.box_loss,
            normalizer=self.normalizer, mining_config=self.mining,
            image_weights=fit_arguments.image_weights(sample_weight, truth["labels"].shape[0]),
        )  # fmt: skip

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss of one batch; evaluation uses it on every backend, and training where there is no own train step."""
        classification, box, divisor, positives = self.loss_terms(x, y, y_pred, sample_weight)
        self._track(classification, box, divisor, positives, ops.shape(x)[0])
        return (classification + self.box_weight * box) / divisor

    def train_step(self, *args):
        """One step; on TensorFlow that of `train_step.py`, of (images, truth) or (images, truth, sample_weight)."""
        if keras.backend.backend() != "tensorflow":
            return super().train_step(*args)
        from retinanet_keras import train_step

        images, truth, sample_weight = keras.utils.unpack_x_y_sample_weight(args[0])
        if self._gradients is None:
            self._gradients = train_step.gradient_function(self, self.jit_step)
        before = train_step.moving_statistics(self) if self.check_finite else None
        own = self._gradients(images, truth["boxes"], truth["labels"], sample_weight)
        sums, norm = train_step.update(self, own, before)
        return self._logs(*sums, gradient_norm=norm)

    def test_step(self, *args):
        """`evaluate` on TensorFlow: Keras's would multiply the loss by the number of replicas."""
        if keras.backend.backend() != "tensorflow":
            return super().test_step(*args)
        images, truth, sample_weight = keras.utils.unpack_x_y_sample_weight(args[0])
        sums = self.loss_terms(images, truth, self(images, training=False), sample_weight)
        return self._logs(*sums, ops.shape(images)[0])

    def _logs(self, classification, box, divisor, positives, batch, **others):
        """Sums of some images, counted in, and what to log of all so far."""
        import tensorflow as tf

        self._track(classification, box, divisor, positives, batch)
        loss = (classification + self.box_weight * box) / divisor
        self._loss_tracker.update_state(loss, sample_weight=divisor)
        logs = {**self.get_metrics_result(), **others}
        if isinstance(self.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy):
            logs = {name: tf.reshape(value, (1,)) for name, value in logs.items()}  # Keras averages them over axis 0
        return logs

    def _track(self, classification, box, divisor, positives, batch):
        self.classification_tracker.update_state(classification / divisor, sample_weight=divisor)
        self.box_tracker.update_state(box / divisor, sample_weight=divisor)
        batch = ops.cast(batch, "float32")
        self.positives_tracker.update_state(positives / batch, sample_weight=batch)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Keras would take a batch from the data, and fail where replicas' shapes differ; all weights exist already."""
        if self.optimizer is not None and not self.optimizer.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)

    # Inference

    def detect(self, images, sizes=None):
        """Detections in images as they are: nothing is resized.

        Args:
            images: RGB [B, H, W, 3] of 0..255, uint8 or float.
            sizes: [B, 2], height and width of each image before padding, to which boxes are clipped; None: H and W.

        Returns:
            dict of boxes float32 [B, D, 4] in absolute pixels x1, y1, x2, y2, scores float32 [B, D] falling, labels
            int32 [B, D], count int32 [B]; D = `detection.max_detections`. Rows past count: box 0, score 0, label -1.
        """
        images = ops.convert_to_tensor(images)
        _check_images(images)
        if sizes is None:
            sizes = _own_sizes(images)
        if keras.backend.backend() != "tensorflow":
            return self.detect_in_graph(images, sizes)
        import tensorflow as tf

        if self._detect_graph is None:
            self._detect_graph = tf.function(self.detect_in_graph, reduce_retracing=True, autograph=False)
        return self._detect_graph(images, tf.cast(sizes, tf.float32))

    def predict(self, x, batch_size=None, verbose="auto", steps=None, callbacks=None):
        """Keras's `predict`, which fails on an empty array; here that has no detections."""
        if getattr(x, "shape", None) and x.shape[0] == 0:
            return self.predict_on_batch(x)
        return super().predict(x, batch_size, verbose, steps, callbacks)

    def predict_step(self, *args):
        """`predict` gives the dict of `detect`."""
        images, truth, _ = keras.utils.unpack_x_y_sample_weight(args[-1])
        _check_images(images)
        sizes = truth["size"] if truth and "size" in truth else _own_sizes(images)
        if keras.backend.backend() != "jax":
            return self.detect_in_graph(images, sizes)
        trained, others = args[0]  # JAX passes the variables' values
        values = zip([*self.trainable_variables, *self.non_trainable_variables], [*trained, *others], strict=True)
        with keras.StatelessScope(state_mapping=list(values)):
            return self.detect_in_graph(images, sizes), others

    def detect_in_graph(self, images, sizes):
        """`detect` without its own compilation, for use in a larger graph."""

        def detect(images, sizes):
            return self.decode_in_graph(self.outputs_in_graph(images, sizes), images, sizes)

        return detections.for_any_batch(detect)(images, sizes)

    def outputs_in_graph(self, images, sizes):
        """The first half of `detect_in_graph`: logits and deltas, with nothing beyond an image's size."""
        pixels = self.normalize(images, self.detection.pad_multiple, ops.cast(sizes, "float32"))
        return self._forward(pixels, False)

    def decode_in_graph(self, outputs, images, sizes):
        """The second half: detections from the outputs of the first, and its arguments."""
        settings = dataclasses.asdict(self.detection)
        anchors, per_level = self._anchors_of(images, settings.pop("pad_multiple"))
        sizes = ops.cast(sizes, "float32")
        return detections.decode(
            outputs["logits"], outputs["deltas"], anchors, per_level, sizes[:, 0], sizes[:, 1], **settings
        )

    def normalize(self, images, multiple=SIZE_MULTIPLE, sizes=None):
        """Pixels to network input: (RGB - mean) / std, padded with 0 at the right and the bottom.

        Args:
            images: RGB [B, H, W, 3] of 0..255, any dtype.
            multiple: of which the padded height and width are.
            sizes: float32 [B, 2], height and width of each image; what is beyond them becomes padding, too.

        Returns:
            float32 [B, H', W', 3].
        """
        height, width = ops.shape(images)[1:3]
        mean, std = (ops.convert_to_tensor([float(v) for v in values]) for values in (self.pixel_mean, self.pixel_std))
        x = (ops.cast(images, "float32") - mean) / std
        if sizes is not None:
            rows, columns = (ops.cast(ops.arange(side), "float32") for side in (height, width))
            inside = (rows[None, :, None] < sizes[:, :1, None]) & (
                columns[None, None] < sizes[:, 1:, None]
            )  # [B, H, W]
            x = ops.where(inside[..., None], x, 0.0)
        bottom, right = ((multiple - side % multiple) % multiple for side in (height, width))
        if not (isinstance(bottom, int) and isinstance(right, int) and bottom == right == 0):
            x = ops.pad(x, [[0, 0], [0, bottom], [0, right], [0, 0]])
        return x

    def _anchors_of(self, images, multiple):
        """(anchors [A, 4], anchors per level) of a batch, padded to a multiple."""
        height, width = (-(-side // multiple) * multiple for side in ops.shape(images)[1:3])
        return anchor_boxes(height, width, self.anchors), level_sizes(height, width, self.anchors)

    # Saving

    @functools.wraps(keras.Model.save)
    def save(self, filepath, overwrite=True, zipped=None, **kwargs):
        if overwrite or keras_files.may_replace(filepath):
            with keras_files.replacing(filepath) as path:
                super().save(path, zipped=zipped, **kwargs)

    @functools.wraps(keras.Model.save_weights)
    def save_weights(self, filepath, overwrite=True, max_shard_size=None):
        if max_shard_size is not None:  # several files
            super().save_weights(filepath, overwrite, max_shard_size)
        elif overwrite or keras_files.may_replace(filepath):
            with keras_files.replacing(filepath) as path:
                super().save_weights(path)

    @functools.wraps(keras.Model.load_weights)
    def load_weights(self, filepath, skip_mismatch=False, **kwargs):
        keras_files.check(filepath)
        super().load_weights(filepath, skip_mismatch, **kwargs)

    def load_own_variables(self, store):
        keras_files.check_store(store)
        super().load_own_variables(store)

    def get_config(self):
        """Everything but the weights; a reloaded model does not fetch pre-trained ones again."""
        settings = {name: dataclasses.asdict(getattr(self, name)) for name in ("anchors", "targets", "detection")}
        if isinstance(self._settings["backbone"], keras.Model):
            settings["backbone"] = keras.saving.serialize_keras_object(self.backbone)
        return {**super().get_config(), **self._settings, **settings}

    @classmethod
    def from_config(cls, config):
        kinds = {"anchors": AnchorConfig, "targets": TargetConfig, "detection": DetectionConfig}
        settings = {}
        if isinstance(config["backbone"], dict):
            settings["backbone"] = keras.saving.deserialize_keras_object(config["backbone"])
        for name, kind in kinds.items():
            values = dict(config[name])
            settings[name] = kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
        return cls(**{**config, **settings})


@contextlib.contextmanager
def _layers_of(policy):
    """Layers made within have this dtype policy, those inside other layers, too."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _check_images(images):
    if len(images.shape) != 4 or images.shape[-1] != 3 or 0 in images.shape[1:3]:
        raise ValueError(
            f"images: expected RGB images [B, H, W, 3] of one pixel or more, got shape {tuple(images.shape)}"
        )


def _own_sizes(images):
    """Height and width of every image of a batch, int [B, 2]."""
    batch, height, width = ops.shape(images)[:3]
    return ops.tile(ops.stack([height, width])[None], (batch, 1))
