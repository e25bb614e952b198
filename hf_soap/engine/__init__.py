"""The step that all optimizers share: buckets of stacked state, the loop over them, refreshes, skipped steps.

May import ``checkpoint``, ``rules`` and the folders below them.
"""
