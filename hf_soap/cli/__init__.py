"""The commands of ``hf-soap``, one thin module for each.

May import all other folders.
"""
