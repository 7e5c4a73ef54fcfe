"""What proposes tokens: the predictor and its files, draft trees, and the trees tuned for a machine."""
