"""Where FIRP's users already are: what does another tool load, and what does that hand on to `firp.generate`?"""
