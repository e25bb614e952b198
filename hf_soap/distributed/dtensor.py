"""Sharded parameters: all that the package uses of DTensors and process groups.

Each rank treats its shard as a tensor of its own. The state of a shard is saved as a DTensor. State in the tensor's
coordinates gets the tensor's shape. All other state gets a leading dimension for each dimension of the mesh, in which
each rank has one index.
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
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True)
class Shard:
    """The position of a rank's part in a tensor.

    Attributes:
        whole: Shape of the whole tensor.
        offset: Index of the part's first entry in the whole tensor.
        size: Shape of the part; it is empty on some ranks.
        largest: Shape of the largest part of any rank. All ranks plan by it, so that they decide alike.
    """

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    largest: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of entries of the part."""
        return math.prod(self.size)

    def of(self, tensor: Tensor) -> Tensor:
        """Views this part of a whole tensor."""
        cut = zip(self.offset, self.size, strict=True)
        return tensor[tuple(slice(start, start + size) for start, size in cut)]


PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, replicated ones included."""
    if type(tensor) in PLAIN:  # called several times for each parameter and step
        return False
    dtensor = sys.modules.get(
        "torch.distributed.tensor"
    )  # if it is not loaded, no DTensor exists; loading it takes 0.6 s
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a tensor as a view; a plain tensor is returned itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


def local_grad(param: Tensor) -> Tensor | None:
    """Returns the gradient of this rank's part of a parameter; see :func:`settle_gradient_`."""
    return None if param.grad is None else local(param.grad)


def settle_gradient_(param: Tensor) -> None:
    """Gives a gradient the placements of its parameter: tensor parallelism may leave partial sums."""
    grad = param.grad
    if grad is not None and is_sharded(param) and is_sharded(grad) and grad.placements != param.placements:
        param.grad = grad.redistribute(placements=param.placements)


def shard_of(param: Tensor) -> Shard:
    """Returns the position of this rank's part of a parameter; for a plain tensor, that is all of it."""
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
    """Gathers the shards of all ranks, as one list for each parameter. All ranks must call this."""
    own = [shard_of(param) for param in params]
    gathered: list[list[Shard]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, own)
    return [list(shards) for shards in zip(*gathered, strict=True)]


def is_cut(placement: Placement) -> TypeGuard[Any]:
    """Whether a placement splits the tensor among the ranks of its mesh dimension."""
    return hasattr(placement, "dim")  # Shard and _StridedShard; in torch 2.6, is_shard() is false for the second


def check_placements(param: Tensor) -> None:
    """Refuses a sharded parameter whose parts are not plain slices of it.

    Raises:
        ValueError: If a placement is neither Shard nor Replicate, or FSDP1 or ZeRO-3 flattened the parameter.
    """
    for sign, maker in (("_fsdp_flattened", "FSDP1"), ("_is_flat_param", "FSDP1"), ("ds_id", "DeepSpeed ZeRO-3")):
        if getattr(param, sign, False) is not False:
            raise ValueError(
                f"got a parameter of shape {tuple(param.shape)} that {maker} flattened, wanted a tensor or a DTensor: "
                "on flat vectors the optimizer can only be Adam; use FSDP2 (fully_shard) or DDP"
            )
    if is_sharded(param):
        odd = [str(p) for p in param.placements if not (is_cut(p) or p.is_replicate())]
        if odd:
            raise ValueError(
                f"got a parameter of shape {tuple(param.shape)} with the placement {odd[0]}, "
                "wanted Shard or Replicate; redistribute the parameter before the optimizer is created"
            )


def stack_sizes(param: Tensor) -> tuple[int, ...]:
    """Returns the leading dimensions of state that differs between ranks; none if there is only one part."""
    if not is_sharded(param):
        return ()
    pairs = zip(param.device_mesh.shape, param.placements, strict=True)
    sizes = tuple(ranks if is_cut(placement) else 1 for ranks, placement in pairs)
    return sizes if math.prod(sizes) > 1 else ()


def to_stack(param: Tensor, value: Tensor) -> Tensor:
    """Stacks the state of all ranks as one DTensor, without communication.

    Args:
        param: The parameter that the state belongs to.
        value: State of this rank, of the same shape on every rank.

    Returns:
        The value itself for a plain parameter; otherwise a DTensor of shape (*stack_sizes, *value.shape).
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
    """Wraps state of the shape of this rank's part as a DTensor with the parameter's placements."""
    if not is_sharded(param):
        return value
    return _wrap(value, param, param.placements, tuple(param.shape))


def part_of(param: Tensor, value: Tensor) -> Tensor:
    """Returns a copy of this rank's part of a tensor of a parameter's shape, on the device of the parameter.

    All ranks that share the parameter must call this together, with a whole tensor or a DTensor.
    """
    if is_sharded(value) and is_sharded(param) and _places(value) == _places(param):
        part = local(value)
    else:
        part = shard_of(param).of(gathered(value))
    return part.detach().to(local(param).device, copy=True)


def _places(tensor: DTensor) -> tuple[Any, ...]:
    return tensor.device_mesh, tensor.placements


def gathered(value: Tensor) -> Tensor:
    """Returns the full tensor of a DTensor; all ranks must call this. A plain tensor is returned itself."""
    if not is_sharded(value):
        return value
    # NCCL cannot reach offloaded tensors.
    near: Any = value.to(value.device_mesh.device_type)
    whole: Tensor = near.full_tensor()
    return whole


def place_in_stack(param: Tensor) -> tuple[int, ...]:
    """Returns this rank's index in the leading dimensions that :func:`to_stack` adds."""
    if not is_sharded(param) or not stack_sizes(param):
        return ()
    coordinate = param.device_mesh.get_coordinate()
    if coordinate is None:
        raise RuntimeError(
            f"got a rank outside the mesh of a parameter of shape {tuple(param.shape)}, wanted one of its ranks; "
            "give the optimizer only parameters of this rank's meshes"
        )
    pairs = zip(coordinate, param.placements, strict=True)
    return tuple(place if is_cut(placement) else 0 for place, placement in pairs)


def reshard(model: nn.Module) -> None:
    """Drops the weights that a forward pass under FSDP2 has gathered, since the next one would use them again."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # if it is not loaded, no such model exists
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def ranks() -> int:
    """Returns the number of processes that train together."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the rank of this process."""
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def from_all(value: Any) -> list[Any]:
    """Gathers a small object that can be pickled from each rank; all ranks must call this."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    torch.distributed.all_gather_object(values, value)
    return values


def raise_together(error: Exception | None) -> None:
    """Raises the error of any rank on all ranks; all ranks must call this.

    Args:
        error: This rank's error, if there is one.

    Raises:
        ValueError: If any rank has an error; it names the first such rank.
    """
    if ranks() == 1 and error is not None:
        raise error
    for number, text in enumerate(from_all(None if error is None else str(error))):
        if text is not None:
            raise ValueError(f"{text} (found by rank {number} of {ranks()})") from error


def wire_device(param: Tensor) -> torch.device:
    """Returns the device on which the ranks of a parameter communicate; offloaded parts are on another."""
    if not is_sharded(param) or param.device_mesh.device_type == "cpu":
        return local(param).device
    return torch.device(param.device_mesh.device_type, torch.get_device_module().current_device())


def agree(fine: bool, params: Sequence[Tensor]) -> bool:
    """Returns whether a condition holds on all ranks that share sharded parameters; the one collective of a step.

    Args:
        fine: Whether it holds on this rank.
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
    """Sums numbers over all ranks, all of which must call this with equally many.

    Args:
        numbers: This rank's numbers.
        param: Any parameter; the ranks communicate on its device.
    """
    if ranks() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=wire_device(param))
    torch.distributed.all_reduce(total)
    added: list[float] = total.tolist()
    return added


def summed_parts(params: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Sums what each rank has computed from its part of each parameter over the ranks that have the other parts.

    There is one collective for each mesh and dimension along which parameters are cut.

    Args:
        params: Sharded ones in the same order on every rank; all ranks must call this together.
        values: One tensor for each parameter, of the same shape on every rank.

    Returns:
        The sums; the values themselves for parameters that are whole.
    """
    sums = list(values)
    alike: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for place, param in enumerate(params):
        if is_sharded(param) and stack_sizes(param):
            cuts = tuple(dim for dim, placement in enumerate(param.placements) if is_cut(placement))
            alike.setdefault((param.device_mesh, cuts), []).append(place)
    for (mesh, cuts), places in alike.items():
        flat = torch.cat([values[place].flatten() for place in places]).to(wire_device(params[places[0]]))
        for dim in cuts:
            torch.distributed.all_reduce(flat, group=mesh.get_group(dim))
        for place, total in zip(places, flat.split([values[place].numel() for place in places]), strict=True):
            sums[place] = total.view_as(values[place]).to(values[place].device)
    return sums


def _wrap(value: Tensor, param: DTensor, placements: Sequence[Placement], shape: tuple[int, ...]) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    # With uneven parts, from_local cannot infer the whole shape from this rank's part.
    wrapped: Tensor = DTensor.from_local(
        value, param.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return wrapped


class ReplicaGroup:
    """Ranks with equal state, as under DDP, which split decompositions among them."""

    def share(
        self, compute: Callable[[Tensor], tuple[Tensor, ...]], batch: Tensor, *, turn: int
    ) -> tuple[Tensor, ...]:
        """Decomposes each matrix on one rank and sends the results to all, equal bit for bit to decomposing all.

        Args:
            compute: Decomposes a batch (..., n, n), each matrix independently; it must accept an empty batch.
            batch: (blocks, n, n), the same on every rank.
            turn: The rank that takes the first share, modulo the number of ranks; the others follow in order.

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
