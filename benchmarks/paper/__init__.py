"""The figures of the FIRP paper (arXiv 2410.20488), made again with a small model: `python -m benchmarks.paper`."""
