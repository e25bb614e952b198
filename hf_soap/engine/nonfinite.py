"""Steps with NaN or Inf in a gradient: they are skipped and counted, and too many in a row raise an error."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_soap.distributed import dtensor
from hf_soap.engine.step import grads_are_finite

logger = logging.getLogger(__name__)

Groups = Sequence[Mapping[str, Any]]

ASYNC_DEVICES: set[str] = set()
"""Kinds of devices on which the host does not wait to learn whether gradients are finite: they would run idle."""


@dataclass
class FiniteCheck:
    """Whether the gradients of one step were finite: known to the device at once, and read by the host a step later.

    Until then the host takes them for finite; the device undoes the step where they were not.

    Attributes:
        grads_finite: A scalar of bool on the device.
        counted: Counts of steps that the host has raised meanwhile.
    """

    grads_finite: Tensor
    counted: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        if self.grads_finite.device.type == "cuda":
            self._read = torch.empty((), dtype=torch.bool, pin_memory=True, device="cpu")
            self._read.copy_(self.grads_finite, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(self.grads_finite.device))
        else:
            self._read = self.grads_finite.clone()

    def resolve(self) -> bool:
        """Returns whether they were, and lowers the counts again if the step was skipped."""
        if self._event is not None:
            self._event.synchronize()  # a step old: the device has other work meanwhile
        grads_finite = bool(self._read)
        for count in [] if grads_finite else self.counted:
            count.sub_(1).clamp_(min=0)  # 0 is one whose tensors have started anew since
        return grads_finite


class NonfiniteGuard:
    """Checks the gradients of each step, and counts the steps that were skipped.

    Attributes:
        grads_finite: Whether the gradients of the current step are finite, a scalar of bool, where only the device
            knows.
        in_a_row: How many steps were skipped since the last that was not, as far as the host knows.
    """

    def __init__(self) -> None:
        self.grads_finite: Tensor | None = None
        self.in_a_row = 0
        self._skipped = 0
        self._pending: FiniteCheck | None = None

    def skipped(self) -> int:
        """Returns how many steps were skipped, for which the host waits for the device."""
        self.resolve_pending()
        return self._skipped

    def resolve_pending(self) -> None:
        """Reads whether the gradients of the last step were finite, where that was left on the device."""
        check, self._pending = self._pending, None
        if check is not None:
            self._count(grads_finite=check.resolve())

    def counted(self, count: Tensor) -> None:
        """Takes note of a count on the host that was raised before the check of this step was read."""
        if self._pending is not None:
            self._pending.counted.append(count)

    def admits(self, groups: Groups, *, defers: bool, name: str) -> bool:
        """Says whether the gradients of a step are finite where a group wants to know.

        Where only the device knows, the answer is yes, and the device undoes the step unless :attr:`grads_finite`.

        Args:
            groups: The param groups.
            defers: Whether the step can be put back on the device.
            name: Of the optimizer.

        Raises:
            ValueError: If a gradient is sparse.
        """
        checked, guarded = _gradients(groups, name)
        flags = [grads_are_finite(grads) for grads in checked]
        if guarded and dtensor.local(guarded[0]).device.type in ASYNC_DEVICES:
            # A rank without a part of any parameter learns of a step when the others do.
            wire = dtensor.wire_device(guarded[0])
            flags = [flag.to(wire) for flag in flags] or [torch.ones((), dtype=torch.bool, device=wire)]
        self.grads_finite = None
        if flags and defers and all(flag.device.type in ASYNC_DEVICES for flag in flags):
            flag = torch.stack([flag.to(flags[0].device) for flag in flags]).all()
            self.grads_finite = dtensor.agreed(flag, guarded)
            self._pending = FiniteCheck(self.grads_finite)
            return True
        grads_finite = dtensor.agree(all(map(bool, flags)), guarded)
        self._count(grads_finite=grads_finite)
        return grads_finite

    def raise_after_too_many(self, groups: Groups) -> None:
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

    def _count(self, *, grads_finite: bool) -> None:
        self._note(self._skipped + (not grads_finite), 0 if grads_finite else self.in_a_row + 1)

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
    """Names the first parameter whose gradient is not finite now: after a late check it may be gone."""
    for number, group in enumerate(groups):
        names = group.get("param_names") or group.get("names") or []
        for place, param in enumerate(group["params"]):
            grad = dtensor.local_grad(param) if param.requires_grad else None
            if grad is not None and grad.numel() and not bool(grads_are_finite([grad])):
                name = names[place] if place < len(names) else f"parameter {place} of group {number}"
                return f" (now in {name}, of shape {tuple(param.shape)})"
    return ""
