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
from hf_soap.rules.base import OWN_ROLES, StateSpec

Format = Literal["float32", "bfloat16"]

COUNT = torch.float64
"""Dtype of counts of steps: float32 stands still at 2^24, and refreshes with it."""


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

    def form(self, spec: StateSpec, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        """Returns the shape of a block and the dtype in which state is kept that is computed in ``dtype``."""
        shape, rounded = spec.shape, self.format != "float32" and spec.may_round
        if self.packed and spec.is_symmetric:
            shape = (shape[-1] // 2 + 1, shape[-1])
        return shape, torch.bfloat16 if rounded else dtype

    def allocate(
        self, specs: Mapping[str, StateSpec], blocks: int, *, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """Returns zeros by role, (blocks, ...) each, in the form that state is kept in."""
        forms = {role: self.form(spec, dtype) for role, spec in specs.items()}
        return {
            role: torch.zeros(blocks, *shape, dtype=kept_dtype, device=device)
            for role, (shape, kept_dtype) in forms.items()
        }

    def converted(
        self, known: Mapping[str, Any], wanted: Mapping[str, Tensor], specs: Mapping[str, StateSpec]
    ) -> dict[str, Any]:
        """Returns state that was kept in any form in that of ``wanted``; as it is where it has other tensors.

        Args:
            known: State of one parameter by role; what is no tensor and what has no place in ``wanted`` stays.
            wanted: Tensors of the right shapes and dtypes, which came from :meth:`allocate`; ``step`` beside them.
            specs: What the roles are.
        """
        tensors = {role: value for role, value in known.items() if isinstance(value, Tensor) and role != "step"}
        like = {role: value for role, value in wanted.items() if role != "step"}
        if tensors.keys() == like.keys() and all(_alike(tensors[role], like[role]) for role in like):
            return dict(known)
        state = decoded(tensors, specs, torch.float32)
        # What is unknown, or has another shape than it should, stays as it is: the check of the state reports it.
        fitting = {
            role for role, value in state.items() if role in specs and tuple(value.shape[1:]) == specs[role].shape
        }
        kept = {role: value for role, value in state.items() if role not in fitting}
        for role in fitting:
            shape, dtype = self.form(specs[role], state[role].dtype)
            kept[role] = torch.zeros(state[role].shape[0], *shape, dtype=dtype, device=state[role].device)
        self.encode_(kept, {role: state[role] for role in fitting}, specs, None)
        rest = {role: value for role, value in known.items() if role not in tensors}
        return {**kept, **rest}

    def decode(
        self, kept: Mapping[str, Tensor], specs: Mapping[str, StateSpec], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Returns state to compute with; what is kept as it is comes as it is, and is changed in place."""
        return dict(kept) if self.is_identity else decoded(kept, specs, dtype)

    def encode_(
        self,
        kept: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        specs: Mapping[str, StateSpec],
        keys: Sequence[int] | None,
    ) -> None:
        """Puts computed state back into the form that it is kept in.

        Args:
            kept: State in that form, changed in place.
            state: Tensors of it to be put back, by role; used up.
            specs: What the roles are.
            keys: A number for each of the tensors that the leading dimension consists of: what is rounded at random
                depends on it and on the role alone. None rounds to nearest.
        """
        for role, value in state.items():
            target, spec = kept[role], specs[role]
            if value is target:
                continue
            if self.packed and spec.is_symmetric:
                value = matrices.pack(value)
            if self.format != "float32" and spec.may_round:
                value = value.to(torch.float32).contiguous()
                for part, key in zip(value.chunk(len(keys)), keys, strict=True) if keys is not None else ():
                    _round_at_random_(part, key=_mixed(key, zlib.crc32(role.encode())))
            target.copy_(value)


def decoded(kept: Mapping[str, Tensor], specs: Mapping[str, StateSpec], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns state of any form to compute with in ``dtype``; what is in that form already comes as it is.

    Args:
        kept: State by role.
        specs: What the roles are; one that is not among them is only brought to ``dtype``.
        dtype: For what was rounded.
    """
    state: dict[str, Tensor] = {}
    for role, value in kept.items():
        value = value.to(dtype) if value.dtype == torch.bfloat16 else value
        symmetric = role in specs and specs[role].is_symmetric
        packed = symmetric and value.dim() > 1 and value.shape[-2] == value.shape[-1] // 2 + 1
        state[role] = matrices.unpack(value) if packed and value.shape[-1] > 2 else value
    return state


def _alike(kept: Tensor, wanted: Tensor) -> bool:
    exact = (torch.float32, torch.float64)
    return kept.shape == wanted.shape and (kept.dtype == wanted.dtype or {kept.dtype, wanted.dtype} <= set(exact))


def is_own(role: Any) -> bool:
    """Whether state under this key is the family's; a wrapper may keep state of another kind beside it."""
    return isinstance(role, str) and name_of(role) in OWN_ROLES


def name_of(role: str) -> str:
    """Returns a role without the number of its mode."""
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
