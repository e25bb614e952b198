"""Settings: the options of each optimizer, their checks, how they are read, and which of them apply to a parameter.

May import ``linalg`` and ``distributed``.
"""
