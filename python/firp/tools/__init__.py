"""The machine and its files: what does this know that has nothing to do with decoding?"""
