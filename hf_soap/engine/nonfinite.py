"""Steps with NaN or Inf in a gradient: they are skipped and counted, and too many in a row raise an error."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_soap.distributed import dtensor
from hf_soap.engine.step import SQUARABLE, grads_are_finite

logger = logging.getLogger(__name__)

Groups = Sequence[Mapping[str, Any]]


class NonfiniteGuard:
    """Checks the gradients of each step, and counts the steps that were skipped.

    The host waits for the device until it knows: on an H100 a step that went on and was undone where it had to be was
    no faster, and kept a copy of all state.

    Attributes:
        skipped: How many steps were skipped.
        in_a_row: How many steps were skipped since the last that was not.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.in_a_row = 0
        self._normed: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def know_norm(self, params: Iterable[Tensor], norm: float | Tensor) -> None:
        """Spares the next step the check of gradients whose common norm is known, unless they change before it.

        Args:
            params: Their parameters. Gradients of sharded ones are checked all the same: all ranks must agree.
            norm: The norm of all of them, before or after clipping; nothing is spared if it is not finite.
        """
        self._normed = {}
        if not float(norm) < SQUARABLE[torch.float32]:  # true for NaN
            return
        plain = [param.grad for param in params if param.grad is not None and not dtensor.is_sharded(param)]
        self._normed = {id(grad): (weakref.ref(grad), grad._version) for grad in plain}

    def _is_normed(self, grad: Tensor) -> bool:
        known, version = self._normed.get(id(grad), (None, 0))
        return known is not None and known() is grad and grad._version == version

    def admits(self, groups: Groups, *, name: str) -> bool:
        """Says whether the gradients of a step are finite in the groups that ask for it; all ranks get one answer.

        Args:
            groups: The param groups.
            name: Of the optimizer.

        Raises:
            ValueError: If a gradient is sparse.
        """
        checked, sharded = self._gradients(groups, name)
        self._normed = {}
        flags = [grads_are_finite(grads) for grads in checked]
        finite = dtensor.agree(all(map(bool, flags)), sharded)
        if not (finite or self.skipped):
            logger.warning(
                "A gradient holds NaN, Inf or an entry too large to square: the whole step is skipped, parameters and "
                "state stay as they are."
            )
        self.skipped += not finite
        self.in_a_row = 0 if finite else self.in_a_row + 1
        return finite

    def raise_after_too_many(self, groups: Groups) -> None:
        """Raises where too many steps in a row did not count; all ranks have counted alike."""
        limit = _limit(groups)
        if not limit or self.in_a_row < limit:
            return
        count, self.in_a_row = self.in_a_row, 0  # the caller may catch this and continue
        raise FloatingPointError(
            f"{count} steps in a row had gradients with NaN, Inf or entries too large to square{_first_bad(groups)}, "
            "wanted finite ones: parameters and state are as before them. Look at the loss and the data, lower the "
            "learning rate, or clip gradients; max_skipped_in_a_row=0 skips without end"
        )

    def _gradients(self, groups: Groups, name: str) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Returns the gradients to check, grouped by device and dtype, and the sharded parameters."""
        checked: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        sharded: list[Tensor] = []  # with gradients or without: all ranks must communicate about the same ones
        for group in groups:
            skips = group["nonfinite"] == "skip"
            for param in group["params"]:
                grad, cut = param.grad, dtensor.is_sharded(param)
                if cut and skips:
                    sharded.append(param)
                if grad is None or not param.requires_grad:
                    continue
                if grad.layout != torch.strided:
                    raise ValueError(
                        f"{name} needs dense gradients, got {grad.layout} for a parameter of shape "
                        f"{tuple(param.shape)}; build the embedding with sparse=False"
                    )
                if cut:
                    dtensor.settle_gradient_(param)
                    grad = dtensor.local_grad(param)
                if skips and grad is not None and grad.numel() and not self._is_normed(grad):
                    checked.setdefault((grad.device, grad.dtype), []).append(grad)
        return list(checked.values()), sharded


def _limit(groups: Groups) -> int:
    limits = [group["max_skipped_in_a_row"] for group in groups if group["nonfinite"] == "skip"]
    return min((limit for limit in limits if limit), default=0)


def _first_bad(groups: Groups) -> str:
    """Names the first parameter whose gradient is not finite now: after a late check it may be gone."""
    for number, group in enumerate(groups):
        names = group.get("param_names") or group.get("names") or []
        for place, param in enumerate(group["params"]):
            grad = dtensor.local_grad(param) if param.requires_grad else None
            if grad is not None and grad.numel() and not bool(grads_are_finite([grad])):
                name = names[place] if place < len(names) else f"parameter {place} of group {number}"
                return f" (now in {name}, of shape {tuple(param.shape)})"
    return ""
