"""Errors in a dataset, and boxes that no anchor covers."""
