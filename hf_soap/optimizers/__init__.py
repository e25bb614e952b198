"""What a user constructs: settings, and which rule they mean for a tensor. Also the table of names.

May import ``engine`` and the folders below it.
"""
