"""Atomic file replacement, locks, strict JSON, and untrusted text and archives."""
