"""Experiments: one module per paper, from prompts to figures and computed claims.

Run them with `python -m experiments list | run PAPER... | report`. A module is an experiment if its
name has no leading underscore; it defines `PAPER` and `run(settings, out)`, see `_paper.py`.
"""
