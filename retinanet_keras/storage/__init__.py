"""Files that are whole whatever happens, locks, strict JSON, and strangers' text in messages."""
