"""The user's model: is it one that we can drive exactly, and how are its modules called?"""
