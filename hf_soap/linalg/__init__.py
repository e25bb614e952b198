"""Linear algebra and arithmetic on batches of matrices and vectors: pure functions of tensors.

Imports nothing else from this package.
"""
