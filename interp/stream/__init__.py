"""Exact attention statistics tile by tile, and statistics of residual states; torch only."""
