"""Evaluation and visualization: COCO metrics, pictures and curves."""
