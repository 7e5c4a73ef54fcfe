"""The device side of a run: what does one step do, what does it need in memory, how is it replayed?"""
