"""Recipes and model cards: the settings of a run as a file, checked and exchanged with the Hub.

May import ``planning`` and what stands below it.
"""
