"""What the log stream gets to know about an optimizer."""

from __future__ import annotations

from collections import defaultdict

import torch

from hf_soap import linalg
from hf_soap.stepping import BlockOptimizer
from hf_soap.storage import decoded


@torch.no_grad()
def diagnostics(optimizer: BlockOptimizer) -> dict[str, float]:
    """Measures the health of the preconditioners.

    Args:
        optimizer: Any optimizer of the family.

    Returns:
        ``factor_off_diagonal``: mean over the factors of SOAP of ‖L̂ - diag L̂‖_F / ‖L̂‖_F, 0 where the bases
        diagonalise the factors exactly; ``seeded_share``: share of the tensors with state that have had a non-zero
        gradient;
        ``skipped_steps``: steps left out because of a non-finite gradient. Names carry the prefix ``optimizer/``.
    """
    found: defaultdict[str, list[float]] = defaultdict(list)
    for kept in optimizer.state.values():
        state = decoded(kept, torch.float32)
        found["seeded_share"].append(float(state["step"] > 0))
        for role, value in state.items():
            # Without a basis, a factor lives in the space of the gradients, where it need not be diagonal.
            if role.startswith("factor_") and role.replace("factor", "basis") in state and state["step"] > 0:
                found["factor_off_diagonal"] += linalg.off_diagonal_share(value).tolist()
    means = {f"optimizer/{key}": sum(values) / len(values) for key, values in found.items()}
    return {**means, "optimizer/skipped_steps": float(optimizer.skipped_steps)}
