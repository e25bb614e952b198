"""What a state dict holds, how it is loaded, and how state is resharded for other ranks.

May import ``rules`` and the folders below it.
"""

from hf_soap.checkpoint.files import read

__all__ = ["read"]
