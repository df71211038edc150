"""Images and boxes: COCO files, generated shapes, TFDS; the input pipeline; the check of a dataset."""
