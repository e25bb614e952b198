"""When a Trainer's model holds the averages of its weights: for evaluation, in what is saved, and after training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_soap.distributed import dtensor
from hf_soap.engine.optimizer import BlockOptimizer, unwrapped

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def averages(trainer: Any) -> Iterator[None]:
    """Lets the model of a trainer hold the averages of its weights; afterwards it holds what it held before."""
    before = getattr(unwrapped(trainer.optimizer), "at_average", False)
    exchange(trainer.model, trainer.optimizer, average=True)
    try:
        yield
    finally:
        exchange(trainer.model, trainer.optimizer, average=before)


def exchange(model: nn.Module, optimizer: Any, *, average: bool) -> None:
    """Puts averages into the parameters of a model, or the raw weights back; other optimizers keep no averages.

    Args:
        model: The model.
        optimizer: Its optimizer, wrapped or not; None changes nothing.
        average: Whether the parameters are to hold the averages.
    """
    inner = unwrapped(optimizer)
    if not isinstance(inner, BlockOptimizer):
        return
    if inner.averages_weights if average else inner.at_average:
        dtensor.reshard(model)
        if average:
            inner.eval()
        else:
            inner.train()


def restart(optimizer: Any) -> None:
    """Drops the averages of a Trainer's optimizer, after other weights were loaded into the model."""
    inner = unwrapped(optimizer)
    if isinstance(inner, BlockOptimizer):
        inner.restart_average()
