"""`firp bench`: how fast are decoding methods beside each other, in one run?"""
