"""Textbook SOAP with Newton-Schulz after it, in float64.

Companion of soap.py and mars.py, from which its parts come; it shares no code with the rest of the package.

Sources:
    SOAP: Vyas et al., arXiv:2409.11321. Newton-Schulz and its scale: K. Jordan, Muon (2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_soap.reference.mars import newton_schulz_5
from hf_soap.reference.soap import ReferenceSOAP, SoapBlock


class ReferenceSoapMuon(ReferenceSOAP):
    """W <- W - lr sqrt(max(1, rows / cols)) NS5(D), where D = Q_L (M / (sqrt(V) + eps)) Q_R^T is SOAP's direction.

    Matrices only. Each block counts as a separate matrix. Newton-Schulz forgets the length of D, so that there is no
    bias correction. It divides by the norm of D plus `eps`.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        betas: tuple[float, float] = (0.95, 0.9),
        precondition_frequency: int = 1,
        **options: Any,
    ) -> None:
        options |= {"betas": betas, "precondition_frequency": precondition_frequency, "correct_bias": False}
        super().__init__(weights, **options)

    def _direction(self, block: SoapBlock, grad: Tensor) -> Tensor:
        direction = super()._direction(block, grad)
        rows, cols = direction.shape
        return math.sqrt(max(1.0, rows / cols)) * newton_schulz_5(direction, self.eps)
