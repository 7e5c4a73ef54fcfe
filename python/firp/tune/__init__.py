"""`firp tune`: which of many draft trees decodes fastest on the machine at hand?"""
