"""COCO's numbers as a Keras callback, for `model.fit` on any dataset; the trainer evaluates by it, too."""

import keras
import numpy as np

from retinanet_keras.config import Config
from retinanet_keras.data.coco import Categories, CocoDataset
from retinanet_keras.evaluation import artifacts, coco_metrics, detect
from retinanet_keras.evaluation.results import Records


class CocoMetrics(keras.callbacks.Callback):
    """Evaluates after an epoch and adds `val_AP`, `val_AP50`, ... to its logs: list it before callbacks that read them.

        model.fit(train, epochs=20, callbacks=[CocoMetrics(val), keras.callbacks.ModelCheckpoint(
            "best.keras", monitor="val_AP", mode="max", save_best_only=True)])

    Args:
        data: batches as `model.fit` takes them: a tf.data.Dataset, or whatever gives them anew at each iteration, of
            (images [B, H, W, 3], dict of boxes [B, N, 4], labels [B, N], -1 in padding). Optional in the dict: `size`
            [B, 2], height and width before padding, and `scale` [B], network pixels per pixel of the original, in
            which objects are then small, medium or large. Or a `data.coco.CocoDataset`, whose images are resized and
            whose annotation file is the ground truth, crowds and all.
        config: a Config, of which `data` and `eval` say how a CocoDataset is given to the model, and `eval.library`
            what computes the numbers.
        every: epochs between evaluations.
        prefix: of the names in the logs.

    Attributes:
        metrics: the last numbers, the dict of `coco_metrics.coco_metrics`; None before the first.
        records: the detections behind them, a `evaluation.results.Records`.
    """

    def __init__(self, data, config=None, *, every=1, prefix="val_"):
        super().__init__()
        self.data, self.config, self.every, self.prefix = data, config or Config(), every, prefix
        self.metrics = self.records = None

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every:
            return
        metrics = self.evaluate(self.model)
        if logs is not None:
            numbers = {f"{self.prefix}{name}": metrics[name] for name in coco_metrics.METRICS}
            logs.update({name: value for name, value in numbers.items() if value is not None})

    def evaluate(self, model, label="Validating"):
        """Detect and score; the metrics. `label`: of the progress bar over a CocoDataset."""
        if isinstance(self.data, CocoDataset):
            found = detect.detect_split(model, self.data, self.config, folded=False, label=label)
            self.records = artifacts.collect(found, self.data)
            self.metrics = artifacts.score(self.records, self.data, self.config)
        else:
            truth, self.records = _detect_batches(model, self.data)
            self.metrics = coco_metrics.coco_metrics(truth, self.records, library=self.config.eval.library)
        return self.metrics


def _detect_batches(model, batches):
    """(ground truth as COCO's annotations, Records) of batches for `model.fit`; images are numbered as they come."""
    rows = model.categories or [{"label": i, "id": i + 1, "name": str(i)} for i in range(model.num_classes)]
    categories = Categories.from_list(rows)
    images, annotations, records = [], [], Records("The detections")
    for pixels, truth, *_ in batches:
        boxes, labels = (np.asarray(truth[name]) for name in ("boxes", "labels"))
        scale = np.asarray(truth["scale"]) if "scale" in truth else np.ones(len(boxes))
        found = {name: np.asarray(value) for name, value in model.detect(pixels, truth.get("size")).items()}
        for i, n in enumerate(found["count"]):
            image_id = len(images)
            images.append({"id": image_id})
            detected = (found[name][i, :n] for name in ("scores", "labels"))
            records.append(image_id, found["boxes"][i, :n] / scale[i], *detected, categories)
            real = labels[i] >= 0
            for (x1, y1, x2, y2), label in zip((boxes[i] / scale[i])[real].tolist(), labels[i][real], strict=True):
                annotations.append({
                    "image_id": image_id, "category_id": categories.ids[int(label)], "bbox": [x1, y1, x2 - x1, y2 - y1]
                })  # fmt: skip
    names = [{"id": row["id"], "name": row["name"]} for row in categories.to_list()]
    return {"images": images, "annotations": annotations, "categories": names}, records
