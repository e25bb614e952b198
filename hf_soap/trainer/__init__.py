"""What the Transformers Trainer learns: names, diagnostics, and care in saving and resuming.

May import ``hub`` and what stands below it.
"""
