"""Which steps count: those whose gradients are finite. The others are left out, counted, and do not go on for ever."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_soap.distributed import dtensor
from hf_soap.engine.step import norms_are_sane
from hf_soap.engine.verdict import DEFERS, Verdict

logger = logging.getLogger(__name__)

Groups = Sequence[Mapping[str, Any]]


class Guard:
    """Looks at the gradients of each step, and counts the steps that were left out.

    Attributes:
        usable: Whether the step under way counts, a scalar of bool, where only the device knows.
        in_a_row: How many steps were left out since one that counted, as far as the host has heard.
    """

    def __init__(self) -> None:
        self.usable: Tensor | None = None
        self.in_a_row = 0
        self._skipped = 0
        self._verdict: Verdict | None = None

    def skipped(self) -> int:
        """Returns how many steps were left out, for which the host waits for the device."""
        self.settle()
        return self._skipped

    def settle(self) -> None:
        """Hears the verdict on the last step, where a device has kept it."""
        verdict, self._verdict = self._verdict, None
        if verdict is not None:
            self._count(usable=verdict.settle())

    def counted(self, count: Tensor) -> None:
        """Takes note of counts on the host that were raised in the belief that the step counts."""
        if self._verdict is not None:
            self._verdict.counted.append(count)

    def admits(self, groups: Groups, *, defers: bool, name: str) -> bool:
        """Says whether the gradients of a step are finite where a group wants to know.

        Where only the device knows, the answer is yes, and the step goes on under :attr:`usable`.

        Args:
            groups: The param groups.
            defers: Whether the step can be put back on the device.
            name: Of the optimizer.

        Raises:
            ValueError: If a gradient is sparse.
        """
        checked, guarded = _gradients(groups, name)
        flags = [norms_are_sane(grads) for grads in checked]
        if guarded and dtensor.local(guarded[0]).device.type in DEFERS:
            # A rank that has no part of anything hears of a step when the others do.
            wire = dtensor.wire_device(guarded[0])
            flags = [flag.to(wire) for flag in flags] or [torch.ones((), dtype=torch.bool, device=wire)]
        self.usable = None
        if flags and defers and all(flag.device.type in DEFERS for flag in flags):
            flag = torch.stack([flag.to(flags[0].device) for flag in flags]).all()
            self.usable = dtensor.agreed(flag, guarded)
            self._verdict = Verdict(self.usable)
            return True
        usable = dtensor.agree(all(map(bool, flags)), guarded)
        self._count(usable=usable)
        return usable

    def refuse_to_skip_for_ever(self, groups: Groups) -> None:
        """Raises where too many steps in a row did not count; all ranks have counted alike."""
        limit = _limit(groups)
        if not limit or self.in_a_row < limit:
            return
        count, self.in_a_row = self.in_a_row, 0  # whoever catches this may go on
        raise FloatingPointError(
            f"{count} steps in a row had gradients with NaN, Inf or entries too large to square{_first_bad(groups)}, "
            "wanted finite ones: parameters and state are as before them. Look at the loss and the data, lower the "
            "learning rate, or clip gradients; max_skipped_in_a_row=0 skips without end"
        )

    def _count(self, *, usable: bool) -> None:
        self._note(self._skipped + (not usable), 0 if usable else self.in_a_row + 1)

    def _note(self, skipped: int, in_a_row: int) -> None:
        if skipped and not self._skipped:
            logger.warning(
                "A gradient holds NaN, Inf or an entry too large to square: the whole step is skipped, parameters and "
                "state stay as they are."
            )
        self._skipped, self.in_a_row = skipped, in_a_row


def _limit(groups: Groups) -> int:
    limits = [group["max_skipped_in_a_row"] for group in groups if group["nonfinite"] == "skip"]
    return min((limit for limit in limits if limit), default=0)


def _gradients(groups: Groups, name: str) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Returns the gradients to be looked at, those of a device and dtype together, and whose ranks ask each other."""
    checked: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    guarded: list[Tensor] = []  # sharded parameters, with gradients or without: ranks must ask each other alike
    for group in groups:
        skips = group["nonfinite"] == "skip"
        for param in group["params"]:
            grad, cut = param.grad, dtensor.is_sharded(param)
            if cut and skips:
                guarded.append(param)
            if grad is None or not param.requires_grad:
                continue
            if grad.layout != torch.strided:
                raise ValueError(
                    f"{name} needs dense gradients, got {grad.layout} for a parameter of shape {tuple(param.shape)}; "
                    "build the embedding with sparse=False"
                )
            if cut:
                dtensor.settle_gradient_(param)
                grad = dtensor.local_grad(param)
            if skips and grad is not None and grad.numel():
                checked.setdefault((grad.device, grad.dtype), []).append(grad)
    return list(checked.values()), guarded


def _first_bad(groups: Groups) -> str:
    """Names the first parameter whose gradient is not finite now: with a late verdict it may be gone."""
    for number, group in enumerate(groups):
        names = group.get("param_names") or group.get("names") or []
        for place, param in enumerate(group["params"]):
            grad = dtensor.local_grad(param) if param.requires_grad else None
            if grad is not None and grad.numel() and not bool(norms_are_sane([grad])):
                name = names[place] if place < len(names) else f"parameter {place} of group {number}"
                return f" (now in {name}, of shape {tuple(param.shape)})"
    return ""
