"""Microbenchmarks of the ops: one file per op, run by `python benchmarks/run.py`."""
