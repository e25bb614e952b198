"""Extensions of the Transformers Trainer: optimizer names, diagnostics, and safe saving and resuming.

May import ``hub`` and the folders below it.
"""
