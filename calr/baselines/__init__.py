"""Other ways to make a model smaller, for comparison on the same footing.

They drop, merge or replace while training, so each has its own signature; all work in place.
"""
