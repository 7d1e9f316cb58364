"""Measured runs in, error tables and fitted profiles out.

In: a table of runs (CSV) and the profiles that stand for their clusters. Out: predictions, their errors, constants.
"""
