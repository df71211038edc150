"""Weights that other frameworks released, and the networks they belong to."""
