"""Triton kernels, one op a file; imported on an op's first call."""
