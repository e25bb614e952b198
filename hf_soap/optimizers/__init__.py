"""The optimizers as users meet them: settings, and which rule they mean for a tensor."""

from __future__ import annotations

from hf_soap.optimizers.mars import MARS
from hf_soap.optimizers.shampoo import Shampoo
from hf_soap.optimizers.soap import SOAP

__all__ = ["MARS", "SOAP", "Shampoo"]
