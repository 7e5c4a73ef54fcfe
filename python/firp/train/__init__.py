"""Predictor training: the base model's own text, a ridge start, then KL to its own distribution."""
