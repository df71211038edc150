"""Runs: from a configuration to a trained, evaluated and exported model in a folder."""
