"""Estimates of memory and work of a run, from shapes alone, and settings with which it fits.

May import ``optimizers`` and the folders below it.
"""
