"""Recipes and model cards: the settings of a run in a file, checked, and exchanged with the Hub.

May import ``planning`` and the folders below it.
"""
