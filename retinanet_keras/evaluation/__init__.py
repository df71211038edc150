"""Detections of a split, COCO metrics, and the files written by an evaluation."""
