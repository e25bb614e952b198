"""How state is kept between steps, in fewer bytes than a step computes with."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from hf_soap.linalg import matrices

Format = Literal["float32", "bfloat16"]

SYMMETRIC = ("factor", "root", "snapshot")
"""Kinds of roles that hold symmetric matrices."""

COUNT = torch.float64
"""Dtype of counts of steps: float32 stands still at 2^24, and refreshes with it."""

ROUNDED = ("factor", "root", "basis", "exp_avg", "exp_avg_sq", "prev_grad", "momentum")
"""Kinds of roles that may be rounded; what else there is, is small or must be exact."""

LAYOUT = "layout"
"""Role of the numbers that say how a tensor was cut, in a state dict only."""

KINDS = {
    *ROUNDED,
    *("step", LAYOUT, "snapshot", "diagonal", "exp_avg_sq_row", "exp_avg_sq_col", "prev_param"),
}
"""Kinds of all roles of the family."""


@dataclass(frozen=True)
class Storage:
    """Keeps state in the dtype that it is computed in, or smaller; packed, of symmetric matrices only a triangle.

    Attributes:
        format: ``"bfloat16"`` rounds matrices and entries to that.
        packed: Keep one triangle of symmetric matrices, which is exact.

    What is rounded is rounded stochastically: a moving average whose changes are smaller than the spacing of the
    numbers would otherwise stand still (Gupta et al., arXiv:1502.02551).
    """

    format: Format = "float32"
    packed: bool = False

    @property
    def is_identity(self) -> bool:
        """Whether state is kept as it is computed with."""
        return self.format == "float32" and not self.packed

    def allocate(self, state: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Returns zeros in the form that state like ``state``, which may be on the meta device, is kept in."""
        kept: dict[str, Tensor] = {}
        for role, value in state.items():
            kind, shape, dtype = _kind(role), tuple(value.shape), value.dtype
            if self._packs(kind):
                shape = (*shape[:-2], shape[-1] // 2 + 1, shape[-1])
            if self._rounds(kind):
                dtype = torch.bfloat16
            kept[role] = torch.zeros(shape, dtype=dtype, device=device)
        return kept

    def converted(self, known: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns state that was kept in any form in that of ``wanted``; as it is where it has other tensors.

        Args:
            known: State of one parameter by role; what is no tensor and what has no place in ``wanted`` stays.
            wanted: Tensors of the right shapes and dtypes, which came from :meth:`allocate`; ``step`` beside them.
        """
        tensors = {role: value for role, value in known.items() if isinstance(value, Tensor) and role != "step"}
        like = {role: value for role, value in wanted.items() if role != "step"}
        if tensors.keys() == like.keys() and all(_alike(tensors[role], like[role]) for role in like):
            return dict(known)
        state = decoded(tensors, torch.float32)
        kept = self.allocate(state, next(iter(tensors.values())).device) if tensors else {}
        self.encode_(kept, state, None)
        rest = {role: value for role, value in known.items() if role not in tensors}
        return {**kept, **rest}

    def decode(self, kept: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns state to compute with; what is kept as it is comes as it is, and is changed in place."""
        return dict(kept) if self.is_identity else decoded(kept, dtype)

    def encode_(self, kept: Mapping[str, Tensor], state: Mapping[str, Tensor], keys: Sequence[int] | None) -> None:
        """Puts computed state back into the form that it is kept in.

        Args:
            kept: State in that form, changed in place.
            state: Tensors of it to be put back, by role; used up.
            keys: A number for each of the tensors that the leading dimension consists of: what is rounded at random
                depends on it and on the role alone. None rounds to nearest.
        """
        for role, value in state.items():
            target, kind = kept[role], _kind(role)
            if value is target:
                continue
            if self._packs(kind):
                value = matrices.pack(value)
            if self._rounds(kind):
                value = value.to(torch.float32).contiguous()
                for part, key in zip(value.chunk(len(keys)), keys, strict=True) if keys is not None else ():
                    _round_at_random_(part, key=_mixed(key, zlib.crc32(role.encode())))
            target.copy_(value)

    def _packs(self, kind: str) -> bool:
        return self.packed and kind in SYMMETRIC

    def _rounds(self, kind: str) -> bool:
        return self.format != "float32" and kind in ROUNDED


def decoded(kept: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns state of any form to compute with in ``dtype``; what is in that form already comes as it is."""
    state: dict[str, Tensor] = {}
    for role, value in kept.items():
        value = value.to(dtype) if value.dtype == torch.bfloat16 else value
        packed = _kind(role) in SYMMETRIC and value.dim() > 1 and value.shape[-2] == value.shape[-1] // 2 + 1
        state[role] = matrices.unpack(value) if packed and value.shape[-1] > 2 else value
    return state


def _alike(kept: Tensor, wanted: Tensor) -> bool:
    exact = (torch.float32, torch.float64)
    return kept.shape == wanted.shape and (kept.dtype == wanted.dtype or {kept.dtype, wanted.dtype} <= set(exact))


def is_own(role: Any) -> bool:
    """Whether state under this key is the family's; a wrapper may keep state of another kind beside it."""
    return isinstance(role, str) and _kind(role) in KINDS


def _kind(role: str) -> str:
    """A role without the number of its side."""
    name, _, side = role.rpartition("_")
    return name if side.isdigit() else role


def _round_at_random_(values: Tensor, *, key: int) -> None:
    """Rounds float32 numbers to those of bfloat16, up or down with the probability that keeps their mean."""
    bits = values.view(-1).view(torch.int32)
    for number, piece in enumerate(bits.split(NOISE_LENGTH)):
        start = _mixed(key, number) % NOISE_LENGTH
        noise = _noise(values.device)[start : start + piece.numel()]
        piece.add_(noise).bitwise_and_(-1 << 16)


NOISE_LENGTH = 2**19
"""Numbers that are rounded with one stretch of the noise; where it starts is drawn for each tensor, role and step."""


@lru_cache(maxsize=8)
def _noise(device: torch.device) -> Tensor:
    """Uniform integers of 16 bits, the same on all devices and in all processes."""
    generator = torch.Generator(device="cpu").manual_seed(15022551)
    return torch.randint(2**16, (2 * NOISE_LENGTH,), dtype=torch.int32, generator=generator, device="cpu").to(device)


def _mixed(key: int, other: int) -> int:
    """Mixes two numbers into one of 64 bits, by the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    mixed = (key * 0x9E3779B97F4A7C15 + other + 1) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return mixed ^ (mixed >> 31)


def step_keys(steps: Sequence[int], places: Sequence[int]) -> list[int]:
    """Returns for each tensor the number that its rounding at one step depends on, of its count and its place."""
    return [_mixed(step, place) for step, place in zip(steps, places, strict=True)]
