"""Drawing: one kind of figure per file, results in and axes out, never a model."""
