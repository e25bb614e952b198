"""What tests that generate their cases share: their number, and parameters of any shape, dtype and memory order."""

from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

CASES: Counter[str] = Counter()
"""Cases that ran to their end, by test."""


def cases(share: float = 1.0) -> Callable[[Any], Any]:
    """Runs a test on this share of the profile's cases, and counts them; stands below ``@given``."""

    def decorate(test: Callable[..., None]) -> Any:
        @wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            test(*args, **kwargs)
            CASES[test.__name__] += 1

        return hypothesis.settings(max_examples=share_of_profile(share))(counted)

    return decorate


def share_of_profile(share: float) -> int:
    """A number of cases in proportion to that of the profile, which ``--slow`` chooses."""
    return max(3, round(hypothesis.settings.default.max_examples * share))


SIZES = (0, 1, 2, 3, 5, 7)
THIN = [(1, 67), (61, 2), (1, 1), (2, 1, 31), (1, 1, 1, 1), (37,), (0, 5), (5, 0), (0,), (3, 0, 2)]
shapes = st.one_of(st.lists(st.sampled_from(SIZES), max_size=5).map(tuple), st.sampled_from(THIN)).filter(
    lambda shape: torch.Size(shape).numel() < 1500
)
dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
ORDERS = ["contiguous", "transposed", "channels last", "every other", "offset"]
orders = st.sampled_from(ORDERS)


def in_order(tensor: Tensor, order: str) -> Tensor:
    """The same values in another memory order; "expanded" repeats the first entry instead."""
    if order == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if order == "channels last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if order == "every other":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if order == "offset":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if order == "expanded":
        return (tensor.flatten()[0] if tensor.numel() else tensor.new_zeros(())).expand(tensor.shape)
    return tensor.contiguous()


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers that depend on shape and seed alone, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter(shape: tuple[int, ...], dtype: torch.dtype, order: str, seed: int) -> Parameter:
    """A parameter with weights that depend on shape and seed alone."""
    return Parameter(in_order(noise(shape, seed).to(dtype), order))
