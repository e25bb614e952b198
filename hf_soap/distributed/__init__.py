"""Several ranks: a rank's part of a sharded parameter, and which rank owns which whole matrix.

May import ``linalg``.
"""
