"""Settings: the options of every optimizer, how they are checked and read, and which hold for a parameter.

May import ``linalg`` and ``distributed``.
"""
