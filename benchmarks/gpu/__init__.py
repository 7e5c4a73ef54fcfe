"""What `benchmarks/gpu_check.py` runs on a machine with a GPU."""
