"""Small problems that several test modules train on."""

import io
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from hf_soap.rules.base import Rule
from hf_soap.rules.layout import Layout
from hf_soap.rules.storage import Storage

SHAPES = [(6, 6), (4, 9), (5,), (4, 4, 4), (), (0, 3), (6, 6)]
"""Two share a bucket; a 9-side sees a factor of rank 4 at first; a scalar and an empty tensor are among them."""

FULL_RANK = [(6, 6), (5,), (6, 6), (4, 4, 4), (6, 6), (5,)]
"""Gradients of these give factors of full rank, so that rounding is all that two correct computations differ by."""


def mostly_slow(values: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Parameters of a test, of which only the fast ones run without --slow."""
    return [pytest.param(value, marks=() if value in fast else pytest.mark.slow) for value in values]


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """The same parameters at every call."""
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def fresh_state(
    rule: Rule, layout: Layout, tensors: int = 1, *, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> dict[str, Tensor]:
    """Zero state of a rule by role, as it computes with it."""
    blocks, on = tensors * layout.blocks, torch.device(device)
    return Storage().allocate(rule.state_spec(layout), blocks, dtype=dtype, device=on)


def gradient(param: Tensor, place: int, step: int) -> Tensor:
    """Noise that depends on place and step alone, and a part that depends on the weights."""
    generator = torch.Generator().manual_seed(1000 * place + step)
    noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
    return (noise + 0.5 * param.detach().double()).to(param.dtype)


def train(
    optimizer: Optimizer, params: Sequence[Parameter], steps: Iterable[int], present: Sequence[set[int]] | None = None
) -> None:
    """Takes the steps; `present` says for each parameter at which steps it has a gradient, None that it always has."""
    for step in steps:
        for place, param in enumerate(params):
            has_one = present is None or step in present[place]
            param.grad = gradient(param, place, step) if has_one else None
        optimizer.step()


def snapshot(optimizer: Optimizer, params: Sequence[Parameter]) -> tuple[list[Tensor], dict[str, Any]]:
    """Copies of all parameters and of the optimizer's state dict."""
    return [param.detach().clone() for param in params], optimizer.state_dict()


def assert_same(one: Any, other: Any) -> None:
    """Asserts that two nested structures are equal bit for bit, dtypes included."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other) or torch.equal(
            *(each.flatten().contiguous().view(torch.uint8) for each in (one, other))
        )
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint does to a state dict, read back as the Trainer reads it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded
