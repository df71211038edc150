"""Images and boxes: dataset formats, decoding, the canvas, augmentation, and batches."""
