"""Boxes on pictures, training curves, plots, and tables of text."""
