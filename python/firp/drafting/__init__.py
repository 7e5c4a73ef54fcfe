"""What proposes tokens: the predictor and its files, draft trees, and what they are worth where."""
