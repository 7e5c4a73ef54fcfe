"""The host side of one call: what does the caller ask for, and how do tokens reach the caller?"""
