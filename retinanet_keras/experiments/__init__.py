"""The paper's tables and figures, run, measured and set beside the paper's numbers."""
