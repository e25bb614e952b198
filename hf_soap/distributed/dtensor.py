"""Parameters that are sharded over ranks: what the others need to know of DTensors and process groups.

Each rank works on its own shard as if that were a tensor. A shard's state is saved as a DTensor: state that has the
tensor's own coordinates as one of the tensor's shape, all other state with a leading dimension for every dimension of
the mesh, in which each rank owns one place.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True)
class Shard:
    """Where a rank's part of a tensor lies.

    Attributes:
        whole: Shape of the whole tensor.
        offset: Index of the part's first entry in the whole tensor.
        size: Shape of the part; some ranks may have none of it.
        largest: Shape of the largest part that any rank has, by which all ranks plan alike.
    """

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    largest: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Entries of the part."""
        return math.prod(self.size)

    def of(self, tensor: Tensor) -> Tensor:
        """Views this part of a whole tensor."""
        cut = zip(self.offset, self.size, strict=True)
        return tensor[tuple(slice(start, start + size) for start, size in cut)]


PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, replicated ones included."""
    if type(tensor) in PLAIN:  # asked several times a parameter and step
        return False
    dtensor = sys.modules.get("torch.distributed.tensor")  # not loaded: no DTensor exists, and loading takes 0.6 s
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a tensor, which shares its memory; a plain tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


def local_grad(param: Tensor) -> Tensor | None:
    """Returns the gradient of this rank's part of a parameter; see :func:`settle_gradient_`."""
    return None if param.grad is None else local(param.grad)


def settle_gradient_(param: Tensor) -> None:
    """Cuts a parameter's gradient as the parameter is cut: tensor parallelism may leave sums to be made."""
    grad = param.grad
    if grad is not None and is_sharded(param) and is_sharded(grad) and grad.placements != param.placements:
        param.grad = grad.redistribute(placements=param.placements)


def shard_of(param: Tensor) -> Shard:
    """Says where this rank's part of a parameter lies; the part of a plain tensor is all of it."""
    whole = tuple(param.shape)
    if not is_sharded(param):
        return Shard(whole, (0,) * len(whole), whole, whole)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    largest = list(whole)
    for ranks, placement in zip(param.device_mesh.shape, param.placements, strict=True):
        if is_cut(placement):
            largest[placement.dim] = -(-largest[placement.dim] // ranks)
    return Shard(whole, tuple(offset) or (0,) * len(whole), tuple(local(param).shape), tuple(largest))


def shards_of_ranks(params: Sequence[Tensor]) -> list[list[Shard]]:
    """Asks all ranks for their parts: for each parameter a shard of every rank. All ranks must call this."""
    own = [shard_of(param) for param in params]
    gathered: list[list[Shard]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, own)
    return [list(shards) for shards in zip(*gathered, strict=True)]


def is_cut(placement: Placement) -> TypeGuard[Any]:
    """Whether a placement gives each rank of its mesh dimension another part."""
    return hasattr(placement, "dim")  # Shard and _StridedShard; is_shard() misses the second in torch 2.6


def check_placements(param: Tensor) -> None:
    """Refuses a sharded parameter whose parts are not plain slices of it.

    Raises:
        ValueError: If a placement is neither a shard nor a replica, or FSDP1 or ZeRO-3 made a flat vector of it.
    """
    for sign, maker in (("_fsdp_flattened", "FSDP1"), ("_is_flat_param", "FSDP1"), ("ds_id", "DeepSpeed ZeRO-3")):
        if getattr(param, sign, False) is not False:
            raise ValueError(
                f"got a parameter of shape {tuple(param.shape)} that {maker} flattened, wanted a tensor or a DTensor: "
                "on flat vectors the optimizer could only be Adam; use FSDP2 (fully_shard) or DDP"
            )
    if is_sharded(param):
        odd = [str(p) for p in param.placements if not (is_cut(p) or p.is_replicate())]
        if odd:
            raise ValueError(
                f"got a parameter of shape {tuple(param.shape)} with the placement {odd[0]}, "
                "wanted Shard or Replicate; redistribute the parameter before the optimizer is made"
            )


def stack_sizes(param: Tensor) -> tuple[int, ...]:
    """Leading dimensions of state that every rank has a place of its own in; none where there is one part only."""
    if not is_sharded(param):
        return ()
    pairs = zip(param.device_mesh.shape, param.placements, strict=True)
    sizes = tuple(ranks if is_cut(placement) else 1 for ranks, placement in pairs)
    return sizes if math.prod(sizes) > 1 else ()


def to_stack(param: Tensor, value: Tensor) -> Tensor:
    """Gives a rank's state its place beside that of the other ranks.

    Args:
        param: The parameter that it belongs to.
        value: State of this rank, of the same shape on every rank.

    Returns:
        For a plain parameter the value itself; else a DTensor of shape (*stack_sizes, *value.shape).
    """
    if not is_sharded(param):
        return value
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Cut

    leading = stack_sizes(param)
    cuts = [bool(leading) and is_cut(placement) for placement in param.placements]
    where = [Cut(i) if cut else Replicate() for i, cut in enumerate(cuts)]
    part = value.reshape(*(1 for _ in leading), *value.shape)
    return _wrap(part, param, where, (*leading, *value.shape))


def to_whole(param: Tensor, value: Tensor) -> Tensor:
    """Wraps state in a parameter's own coordinates, of the shape of this rank's part, as the parameter is wrapped."""
    if not is_sharded(param):
        return value
    return _wrap(value, param, param.placements, tuple(param.shape))


def gathered(value: Tensor) -> Tensor:
    """Returns the whole of a DTensor, for which all ranks must call this; a plain tensor itself."""
    if not is_sharded(value):
        return value
    # What was offloaded lies where NCCL cannot reach it.
    near: Any = value.to(value.device_mesh.device_type)
    whole: Tensor = near.full_tensor()
    return whole


def place_in_stack(param: Tensor) -> tuple[int, ...]:
    """Index of this rank in the leading dimensions that :func:`to_stack` adds."""
    if not is_sharded(param) or not stack_sizes(param):
        return ()
    coordinate = param.device_mesh.get_coordinate()
    if coordinate is None:
        raise RuntimeError(f"this rank is not in the mesh of a parameter of shape {tuple(param.shape)}, but steps it")
    pairs = zip(coordinate, param.placements, strict=True)
    return tuple(place if is_cut(placement) else 0 for place, placement in pairs)


def ranks() -> int:
    """Number of processes that train together."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among those that train together."""
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def from_all(value: Any) -> list[Any]:
    """Returns what each rank has, a small object that pickles; all ranks must call this."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    torch.distributed.all_gather_object(values, value)
    return values


def raise_together(error: Exception | None) -> None:
    """Raises on every rank what one of them has found; all ranks must call this.

    Args:
        error: What this rank found.

    Raises:
        ValueError: If any rank found an error; it names the first such rank.
    """
    if ranks() == 1 and error is not None:
        raise error
    for number, text in enumerate(from_all(None if error is None else str(error))):
        if text is not None:
            raise ValueError(f"{text} (found by rank {number} of {ranks()})") from error


def wire_device(param: Tensor) -> torch.device:
    """Returns the device whose tensors the ranks of a parameter exchange; offloaded parts lie on another."""
    if not is_sharded(param) or param.device_mesh.device_type == "cpu":
        return local(param).device
    return torch.device(param.device_mesh.device_type, torch.get_device_module().current_device())


def agree(fine: bool, params: Sequence[Tensor]) -> bool:
    """Says whether all ranks that share sharded parameters are fine; the one collective of a step.

    Args:
        fine: What this rank found.
        params: All parameters; every rank of their meshes must call this at the same time.
    """
    sharded = [param for param in params if is_sharded(param)]
    if not sharded:
        return fine
    import torch.distributed as dist

    flag = torch.tensor(fine, dtype=torch.int32, device=wire_device(sharded[0]))
    meshes = dict.fromkeys(param.device_mesh for param in sharded)
    if any(mesh.size() == dist.get_world_size() for mesh in meshes):
        dist.all_reduce(flag, dist.ReduceOp.MIN)
    else:
        for mesh in meshes:
            for group in mesh.get_all_groups():
                dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return bool(flag)


def summed(numbers: Sequence[float], param: Tensor) -> list[float]:
    """Adds up numbers over all ranks, which all must call this with as many.

    Args:
        numbers: Those of this rank.
        param: Any parameter, which says what devices the ranks exchange tensors of.
    """
    if ranks() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=wire_device(param))
    torch.distributed.all_reduce(total)
    added: list[float] = total.tolist()
    return added


def _wrap(value: Tensor, param: DTensor, placements: Sequence[Placement], shape: tuple[int, ...]) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    # Uneven parts do not tell the whole shape, which from_local would otherwise guess from this rank's.
    wrapped: Tensor = DTensor.from_local(
        value, param.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return wrapped


class ReplicaGroup:
    """Ranks that hold equal state, as under DDP, and split decompositions among them."""

    def share(
        self, compute: Callable[[Tensor], tuple[Tensor, ...]], batch: Tensor, *, turn: int
    ) -> tuple[Tensor, ...]:
        """Computes each matrix on one rank and gives the results to all: bit for bit what each alone would get.

        Args:
            compute: Works on each matrix of a batch (..., n, n) by itself, also on a batch of none.
            batch: (blocks, n, n), the same on every rank.
            turn: The rank that takes the first share, modulo their number; the others follow in turn.

        Returns:
            What ``compute`` returns for the whole batch.
        """
        dist = torch.distributed
        rank, count = dist.get_rank(), dist.get_world_size()
        shares = batch.tensor_split(count)
        whose = [(place + turn) % count for place in range(count)]
        results, works = [], []
        for mine in compute(shares[whose.index(rank)]):
            result = mine.new_empty(batch.shape[0], *mine.shape[1:])
            for owner, part in zip(whose, result.tensor_split(count), strict=True):
                if owner == rank:
                    part.copy_(mine)
                if part.numel():
                    works.append(dist.broadcast(part, src=owner, async_op=True))
            results.append(result)
        for work in works:
            work.wait()
        return tuple(results)
