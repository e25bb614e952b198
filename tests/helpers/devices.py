"""Devices that must not be waited for, and those that have no memory, played on a CPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique_dim", "_unique2", "masked_select"}
"""Operators for which a host waits until a GPU tells it a number."""


class HostWaits(TorchDispatchMode):
    """Refuses operators for which a host waits; counts of steps, which the host keeps, it may read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS and args[0].dtype != torch.float64:
            raise RuntimeError(f"the host waits for the device: {func}")
        return func(*args, **(kwargs or {}))


def out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("no memory")
