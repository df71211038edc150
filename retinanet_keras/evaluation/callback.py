"""COCO's metrics as a Keras callback, for `model.fit` on any dataset; `training.run` uses it, too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from retinanet_keras.config import Config
from retinanet_keras.data.coco import Categories, CocoDataset
from retinanet_keras.evaluation import artifacts, coco_metrics, detect
from retinanet_keras.evaluation.results import ImageDetections, Records

if TYPE_CHECKING:
    from retinanet_keras.model import RetinaNet


class CocoMetrics(keras.callbacks.Callback):
    """Add COCO's metrics to the logs of an epoch: `val_AP`, `val_AP50`, ...; list it before callbacks that read them.

        model.fit(train, epochs=20, callbacks=[CocoMetrics(val), keras.callbacks.ModelCheckpoint(
            "best.keras", monitor="val_AP", mode="max", save_best_only=True)])

    Args:
        data: batches as `model.fit` takes them: a tf.data.Dataset, or any other repeatable iterable, of (images
            [B, H, W, 3], dict of boxes [B, N, 4], labels [B, N], -1 in padding). Optional in the dict: `size` [B, 2],
            height and width before padding, and `scale` [B], network pixels per pixel of the original, so that small,
            medium and large are judged in original pixels. Or a `data.coco.CocoDataset`, whose images are resized and
            whose annotation file is the ground truth, crowds included.
        config: Config. `data` and `eval` control how the images of a CocoDataset are resized and batched,
            `eval.library` chooses the library that computes the metrics.
        every: int. Epochs between evaluations.
        prefix: str. Prefix of the names in the logs.

    Attributes:
        metrics: the latest metrics, the dict of `coco_metrics.coco_metrics`; None before the first evaluation.
        records: the detections that they were computed from, an `evaluation.results.Records`.
    """

    def __init__(
        self,
        data: CocoDataset | Iterable[Any],
        config: Config | None = None,
        *,
        every: int = 1,
        prefix: str = "val_",
    ) -> None:
        super().__init__()
        self.data, self.config, self.every, self.prefix = data, config or Config(), every, prefix
        self.metrics: dict[str, Any] | None = None
        self.records: Records | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if (epoch + 1) % self.every:
            return
        metrics = self.evaluate(self.model)
        if logs is not None:
            numbers = {f"{self.prefix}{name}": metrics[name] for name in coco_metrics.METRICS}
            logs.update({name: value for name, value in numbers.items() if value is not None})

    def evaluate(self, model: RetinaNet, label: str = "Validating") -> dict[str, Any]:
        """Detect, score and return the metrics; `label` is that of the progress bar over a CocoDataset."""
        if isinstance(self.data, CocoDataset):
            detections = detect.detect_split(model, self.data, self.config, folded=False, label=label)
            self.records = artifacts.collect(detections, self.data)
            self.metrics = artifacts.score(self.records, self.data, self.config)
        else:
            truth, self.records = _detect_batches(model, self.data)
            self.metrics = coco_metrics.coco_metrics(truth, self.records, library=self.config.eval.library)
        return self.metrics


def _detect_batches(model: RetinaNet, batches: Iterable[Any]) -> tuple[dict[str, Any], Records]:
    """(ground truth as COCO's annotations, Records) of batches for `model.fit`; images are numbered from 0."""
    rows = model.categories or [{"label": i, "id": i + 1, "name": str(i)} for i in range(model.num_classes)]
    categories = Categories.from_list(rows)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    records = Records("The detections")
    for pixels, truth, *_ in batches:
        boxes, labels = (np.asarray(truth[name]) for name in ("boxes", "labels"))
        scale = np.asarray(truth["scale"]) if "scale" in truth else np.ones(len(boxes))
        detections = {name: np.asarray(value) for name, value in model.detect(pixels, truth.get("size")).items()}
        for i, n in enumerate(detections["count"]):
            image_id = len(images)
            images.append({"id": image_id})
            original_boxes = detections["boxes"][i, :n] / scale[i]
            scores, classes = detections["scores"][i, :n], detections["labels"][i, :n]
            records.append(ImageDetections(image_id, original_boxes, scores, classes), categories)
            real = labels[i] >= 0
            for (x1, y1, x2, y2), label in zip((boxes[i] / scale[i])[real].tolist(), labels[i][real], strict=True):
                box = [x1, y1, x2 - x1, y2 - y1]
                annotations.append({"image_id": image_id, "category_id": categories.ids[int(label)], "bbox": box})
    names = [{"id": row["id"], "name": row["name"]} for row in categories.to_list()]
    return {"images": images, "annotations": annotations, "categories": names}, records
