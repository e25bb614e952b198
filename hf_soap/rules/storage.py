"""How state is stored between steps, in fewer bytes than a step computes with."""

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
"""Dtype of step counts. A float32 count stops at 2^24, and refreshes would stop with it."""


@dataclass(frozen=True)
class Storage:
    """Stores state in the dtype of its computation or a smaller one; packed, only a triangle of symmetric matrices.

    Attributes:
        format: ``"bfloat16"`` rounds to that dtype.
        packed: Store one triangle of symmetric matrices, which loses nothing.

    Rounding is stochastic: a moving average whose changes are smaller than the spacing of the numbers would otherwise
    not change (Gupta et al., arXiv:1502.02551).
    """

    format: Format = "float32"
    packed: bool = False

    @property
    def is_identity(self) -> bool:
        """Whether state is stored in the form in which it is computed."""
        return self.format == "float32" and not self.packed

    def form(self, spec: StateSpec, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        """Returns the stored shape of a block and the stored dtype, for state that is computed in ``dtype``."""
        shape, rounded = spec.shape, self.format != "float32" and spec.may_round
        if self.packed and spec.is_symmetric:
            shape = (shape[-1] // 2 + 1, shape[-1])
        return shape, torch.bfloat16 if rounded else dtype

    def allocate(
        self, specs: Mapping[str, StateSpec], blocks: int, *, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """Returns zeros by role, (blocks, ...) each, in the stored form."""
        forms = {role: self.form(spec, dtype) for role, spec in specs.items()}
        return {
            role: torch.zeros(blocks, *shape, dtype=kept_dtype, device=device)
            for role, (shape, kept_dtype) in forms.items()
        }

    def converted(
        self, known: Mapping[str, Any], wanted: Mapping[str, Tensor], specs: Mapping[str, StateSpec]
    ) -> dict[str, Any]:
        """Converts state from any stored form to that of ``wanted``; state with the same form is only copied.

        Args:
            known: State of one parameter by role. Non-tensors, and tensors without a spec, are not changed.
            wanted: Tensors of the right shapes and dtypes from :meth:`allocate`, and ``step``.
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
        """Returns state to compute with. If it is stored in that form, it is returned itself, not a copy."""
        return dict(kept) if self.is_identity else decoded(kept, specs, dtype)

    def encode_(
        self,
        kept: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        specs: Mapping[str, StateSpec],
        keys: Sequence[int] | None,
    ) -> None:
        """Writes computed state back in its stored form.

        Args:
            kept: State in its stored form, changed in place.
            state: Tensors to be written back, by role; overwritten.
            specs: What the roles are.
            keys: A number for each of the tensors in the leading dimension. Stochastic rounding depends only on it and
                on the role. None rounds to nearest.
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
    """Returns state of any stored form in the form to compute with; tensors in that form already are not copied.

    Args:
        kept: State by role.
        specs: Specs by role. Roles without a spec are only converted to ``dtype``.
        dtype: The dtype of tensors that were rounded.
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
    """Whether state under this key belongs to this package; a wrapper may add state of another kind."""
    return isinstance(role, str) and name_of(role) in OWN_ROLES


def name_of(role: str) -> str:
    """Returns a role without its mode's number."""
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
"""Numbers that are rounded with one section of the noise. Its start is drawn for each tensor, role and step."""


@lru_cache(maxsize=8)
def _noise(device: torch.device) -> Tensor:
    """Returns uniform 16-bit integers, the same on all devices and in all processes."""
    generator = torch.Generator(device="cpu").manual_seed(15022551)
    return torch.randint(2**16, (2 * NOISE_LENGTH,), dtype=torch.int32, generator=generator, device="cpu").to(device)


def _mixed(key: int, other: int) -> int:
    """Mixes two numbers into a 64-bit one, with the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    mixed = (key * 0x9E3779B97F4A7C15 + other + 1) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return mixed ^ (mixed >> 31)


def step_keys(steps: Sequence[int], places: Sequence[int]) -> list[int]:
    """Returns a number for each tensor, from its step count and place, which determines its rounding at one step."""
    return [_mixed(step, place) for step, place in zip(steps, places, strict=True)]
