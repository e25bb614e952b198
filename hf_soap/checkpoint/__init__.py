"""What a state dict holds, how it is loaded, and how state is cut anew for other ranks.

May import ``rules`` and what stands below them.
"""

from hf_soap.checkpoint.state_dict import read

__all__ = ["read"]
