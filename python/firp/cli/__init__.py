"""The command line: which options does a command take, and what does it print?"""
