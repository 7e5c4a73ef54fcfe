"""Other drafters through this engine: Medusa-1 heads, the FIRP paper's early exit; and other packages beside it."""
