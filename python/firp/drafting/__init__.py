"""What proposes tokens: which tree does the predictor draft, and what is it worth on a machine?"""
