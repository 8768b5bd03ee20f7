"""What the fresh process of `test_race` runs."""

import torch


def holding(megabytes):
    return lambda: torch.ones(megabytes << 18).sum()
