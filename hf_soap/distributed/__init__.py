"""Training on several ranks: a rank's shard of a parameter, and which rank owns which matrix.

May import ``linalg``.
"""
