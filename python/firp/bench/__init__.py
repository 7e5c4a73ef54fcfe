"""`firp bench`: decoding methods side by side, in one run."""
