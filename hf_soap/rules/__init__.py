"""Update rules: arithmetic on batches of blocks. A rule never sees a parameter, a mesh or a Trainer."""

from __future__ import annotations

from hf_soap.rules.base import Rule
from hf_soap.rules.elementwise import AdamW, Lion
from hf_soap.rules.mars import Mars
from hf_soap.rules.orthogonal import Orthogonal
from hf_soap.rules.shampoo import Shampoo
from hf_soap.rules.soap import Soap

__all__ = ["AdamW", "Lion", "Mars", "Orthogonal", "Rule", "Shampoo", "Soap"]
