"""Update rules: arithmetic on batches of blocks. A rule never sees a parameter, a mesh or a Trainer.

May import ``linalg``, ``distributed`` and ``config``.
"""
