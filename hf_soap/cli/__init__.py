"""The commands of ``hf-soap``, one thin file each.

May import every other folder.
"""
