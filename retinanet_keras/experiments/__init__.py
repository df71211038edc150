"""The paper's tables as lists of overrides, run, measured and set beside the paper's numbers."""
