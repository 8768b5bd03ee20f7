"""Special attention heads, one kind per file: score, measure on a model, intervene, draw."""
