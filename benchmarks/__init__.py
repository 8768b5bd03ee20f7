"""Benchmarks against the peers: `python -m benchmarks [NAME ...]`, or `make bench`.

A module is a benchmark if its name has no leading underscore. It defines `NAME`, `TARGETS` (a
tuple of `Target`) and `race(quick, device)`, which returns a list of `Race`; see `_race.py`.
"""
