"""What a run will take in memory and time, from shapes alone, and the settings with which it fits.

May import ``optimizers`` and what stands below them.
"""
