"""``hf-soap compare``: what is compared, the runs, their results, and the report of them.

May import all other folders.
"""
