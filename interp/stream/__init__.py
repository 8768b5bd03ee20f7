"""Exact statistics of attention, tile by tile, and of residual states; plain torch, no model."""
