"""The device side of a run: what one step does, what it needs in memory, and how it is replayed."""
