"""From scores to tokens: which token does the model choose at each node of the tree?"""
