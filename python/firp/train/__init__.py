"""Training: how does a predictor learn from the base model's own text?"""
