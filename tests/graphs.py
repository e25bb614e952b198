"""CUDA graphs played on a CPU: what a step sends to the device is recorded, and replayed without Python."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique_dim", "_unique2", "masked_select"}
"""Operators for which a host waits until a GPU tells it a number."""

FROM_HOST = {"lift_fresh"}
"""Operators that take numbers from the host's memory, which a graph would find there no more."""


class Recording(TorchDispatchMode):
    """Records each operator with the tensors that it got and gave, as a graph does with kernels and addresses.

    Whatever Python computes meanwhile (numbers, choices, lists) is part of the record as it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS | FROM_HOST:
            raise RuntimeError(f"the host takes part: {func}")
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, [t for t in tree_iter(result) if isinstance(t, Tensor)]))
        return result

    def foreign(self) -> set[int]:
        """Addresses of the memory that the record takes as given, and that must live as long as it does."""
        given: set[int] = set()
        made: set[int] = set()
        for _, args, kwargs, results in self._calls:
            given |= _memory((args, kwargs)) - made
            made |= _memory(results)
        return given

    def replay(self) -> None:
        """Runs the operators again on the same memory."""
        with torch.no_grad():
            for func, args, kwargs, results in self._calls:
                given = _memory((args, kwargs))
                again = [t for t in tree_iter(func(*args, **kwargs)) if isinstance(t, Tensor)]
                for old, new in zip(results, again, strict=True):
                    if old.untyped_storage().data_ptr() not in given:  # neither in place nor a view
                        old.copy_(new)


def _memory(tree: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tree_iter(tree) if isinstance(t, Tensor)}


class HostWaits(TorchDispatchMode):
    """Refuses operators for which a host waits; counts of steps, which the host keeps, it may read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS and args[0].dtype != torch.float64:
            raise RuntimeError(f"the host waits for the device: {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recording]:
    """Records what runs inside, which believes that it goes into a graph.

    A graph runs nothing while it is captured; here it runs, and the caller puts back what it changed.
    """
    with monkeypatch.context() as patch, Recording() as recording:
        patch.setattr("torch.cuda.is_initialized", lambda: True)
        patch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
        yield recording


def out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("no memory")
