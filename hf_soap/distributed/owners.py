"""Whole-matrix preconditioning on several ranks: each matrix has an owner, which computes its direction.

A step has two exchanges: gradients go to the owners, and directions come back. Both are split into rounds, so that the
gradients of the next round are sent while the directions of this one are computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from hf_soap.distributed.dtensor import Shard, is_sharded, local, local_grad, shards_of_ranks, wire_device

ROUND_BYTES = 128 * 2**20
"""Bytes of gradients that are exchanged at once."""

SEEDED, UPDATED = 1, 2
"""The outcome for a tensor: its state was initialized from the gradient, or there is a direction to apply."""

Outcome = tuple[int, Tensor | None]
"""The outcome, and the direction of the local part."""


def assign(loads: Sequence[tuple[float, float]], ranks: int, known: Sequence[int | None] | None = None) -> list[int]:
    """Assigns an owner to each matrix, so that work and memory are balanced over ranks.

    Args:
        loads: (work, memory) of each matrix, in any units.
        ranks: Number of ranks.
        known: Owners that must not change, because they hold the state.

    Returns:
        The owner of each matrix. The largest is assigned first; each goes to the rank whose larger share, of work or
        of memory, is then the smallest.
    """
    totals = [max(sum(load[kind] for load in loads), 1e-30) for kind in (0, 1)]
    shares = [(work / totals[0], memory / totals[1]) for work, memory in loads]
    held = [[0.0, 0.0] for _ in range(ranks)]
    owners = [-1 if owner is None else owner for owner in known or [None] * len(loads)]

    def give(number: int, owner: int) -> None:
        owners[number] = owner
        for kind in (0, 1):
            held[owner][kind] += shares[number][kind]

    for number, owner in enumerate(owners):
        if owner >= 0:
            give(number, owner)
    open_ = [number for number, owner in enumerate(owners) if owner < 0]
    for number in sorted(open_, key=lambda i: (-max(shares[i]), i)):
        work, memory = shares[number]
        give(number, min(range(ranks), key=lambda r: (max(held[r][0] + work, held[r][1] + memory), sum(held[r]), r)))
    return owners


@dataclass
class Exchange:
    """A collective in progress."""

    works: list[dist.Work]
    received: dict[torch.dtype, list[Tensor]]
    buffers: list[Tensor]

    def readers(self) -> dict[torch.dtype, list[_Reader]]:
        """Waits for the collective, and returns what was received, by dtype and sender."""
        for work in self.works:
            work.wait()
        return {dtype: [_Reader(part) for part in parts] for dtype, parts in self.received.items()}


class Ownership:
    """Which rank owns which parameter, and the exchange of gradients and directions.

    Args:
        params: Whole or sharded parameters, the same in the same order on every rank.
        loads: (work, memory) of each.
        dtypes: The dtype in which the state of each is computed.
        among: All trainable parameters, owned or not.
        known: Previous owners, which hold the state.

    Raises:
        ValueError: If a parameter is not sharded over all ranks, or some parameters are sharded and others are not.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        loads: Sequence[tuple[float, float]],
        dtypes: Sequence[torch.dtype],
        *,
        among: Sequence[Tensor],
        known: Mapping[Tensor, int],
    ) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        for param in params:
            if is_sharded(param) and param.device_mesh.size() != self.ranks:
                raise ValueError(
                    f"shard_mode='owner' got a parameter of shape {tuple(param.shape)} on a mesh of "
                    f"{param.device_mesh.size()} of {self.ranks} ranks, wanted all; use shard_mode='local'"
                )
        if len({is_sharded(param) for param in params}) > 1:
            raise ValueError(
                "shard_mode='owner' got both sharded and whole parameters, wanted one kind: it is not known whether "
                "the gradients of the whole ones are summed over ranks; shard all of them, or use shard_mode='local'"
            )
        self._among = list(among)
        previous = [known.get(param) for param in params]
        self.owner = dict(zip(params, assign(loads, self.ranks, previous), strict=True))
        self._dtype = dict(zip(params, dtypes, strict=True))
        self.rounds = list(_rounds(params, self.ranks))

    @cached_property
    def _parts(self) -> dict[Tensor, list[Shard]]:
        # Lazy: the owners are known without communication.
        params = list(self.owner)
        return dict(zip(params, shards_of_ranks(params), strict=True))

    def fits(self, among: Sequence[Tensor]) -> bool:
        """Whether these are the trainable parameters that it was created for."""
        return len(among) == len(self._among) and all(a is b for a, b in zip(among, self._among, strict=True))

    def owns_exactly(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters that have owners, in their order."""
        return len(params) == len(self.owner) and all(a is b for a, b in zip(params, self.owner, strict=True))

    def owns(self, param: Tensor) -> bool:
        """Whether this rank preconditions a parameter."""
        return self.owner[param] == self.rank

    def start_gradients(self, params: Sequence[Tensor]) -> Exchange:
        """Sends this rank's parts of gradients to their owners; all ranks must call this for the same parameters."""
        outgoing: list[dict[torch.dtype, list[Tensor]]] = [{} for _ in range(self.ranks)]
        sizes: list[dict[torch.dtype, int]] = [{} for _ in range(self.ranks)]
        for param in params:
            owner, dtype = self.owner[param], self._dtype[param]
            if self.rank in self._senders(param):
                grad = local_grad(param)
                part = torch.zeros_like(local(param)) if grad is None else grad
                flag = part.new_full((1,), 0.0 if grad is None else 1.0, dtype=dtype)
                outgoing[owner].setdefault(dtype, []).extend((flag, part.to(dtype).flatten()))
            if owner == self.rank:
                for sender in self._senders(param):
                    size = 1 + self._parts[param][sender].numel
                    sizes[sender][dtype] = sizes[sender].get(dtype, 0) + size
        return self._start(params, outgoing, sizes)

    def finish_gradients(self, params: Sequence[Tensor], exchange: Exchange) -> dict[Tensor, Tensor]:
        """Returns the whole gradients of the parameters that this rank owns, without those that have none."""
        readers = exchange.readers()
        grads, flags = {}, []
        for param in params:
            if not self.owns(param):
                continue
            dtype = self._dtype[param]
            grads[param] = torch.zeros(param.shape, dtype=dtype, device=local(param).device)
            here = []
            for sender in self._senders(param):
                shard, reader = self._parts[param][sender], readers[dtype][sender]
                here.append(reader.take(1))
                shard.of(grads[param]).copy_(reader.take(shard.numel).view(shard.size))
            flags.append(torch.cat(here).amax())
        present = torch.stack(flags).tolist() if flags else []  # one host synchronization, not one per parameter
        return {param: grad for (param, grad), there in zip(grads.items(), present, strict=True) if there}

    def start_directions(self, params: Sequence[Tensor], outcomes: Mapping[Tensor, Outcome]) -> Exchange:
        """Sends every rank its part of the directions of the parameters that this rank owns."""
        outgoing: list[dict[torch.dtype, list[Tensor]]] = [{} for _ in range(self.ranks)]
        sizes: list[dict[torch.dtype, int]] = [{} for _ in range(self.ranks)]
        for param in params:
            dtype, owner = self._dtype[param], self.owner[param]
            if owner == self.rank:
                flag, direction = outcomes.get(param, (0, None))
                if direction is None:
                    direction = torch.zeros(param.shape, dtype=dtype, device=local(param).device)
                for rank, shard in enumerate(self._parts[param]):
                    part = shard.of(direction).flatten()
                    outgoing[rank].setdefault(dtype, []).extend((part.new_full((1,), float(flag)), part))
            size = 1 + self._parts[param][self.rank].numel
            sizes[owner][dtype] = sizes[owner].get(dtype, 0) + size
        return self._start(params, outgoing, sizes)

    def finish_directions(self, params: Sequence[Tensor], exchange: Exchange) -> dict[Tensor, Outcome]:
        """Returns the outcome for each parameter and this rank's part of its direction."""
        readers = exchange.readers()
        flags, parts = [], []
        for param in params:
            reader, shard = readers[self._dtype[param]][self.owner[param]], self._parts[param][self.rank]
            flags.append(reader.take(1)[0])
            parts.append(reader.take(shard.numel).view(shard.size).to(local(param).device))
        happened = torch.stack([flag.float() for flag in flags]).tolist()
        return {p: (int(flag), part) for p, flag, part in zip(params, happened, parts, strict=True)}

    def _senders(self, param: Tensor) -> list[int]:
        """Returns a sender for each part of a parameter: its owner if it has the part, else the first rank with it."""
        owner, chosen = self.owner[param], dict[tuple[int, ...], int]()
        for rank, shard in enumerate(self._parts[param]):
            if shard.numel and (shard.offset not in chosen or rank == owner):
                chosen[shard.offset] = rank
        return sorted(chosen.values())

    def _start(
        self,
        params: Sequence[Tensor],
        outgoing: Sequence[Mapping[torch.dtype, list[Tensor]]],
        sizes: Sequence[Mapping[torch.dtype, int]],
    ) -> Exchange:
        exchange = Exchange([], {}, [])
        device = wire_device(params[0])
        for dtype in sorted({self._dtype[param] for param in params}, key=str):
            pieces = [to_rank.get(dtype, []) for to_rank in outgoing]
            splits = [sum(piece.numel() for piece in to_rank) for to_rank in pieces]
            flat = list(itertools.chain.from_iterable(pieces))
            outbound = torch.cat(flat).to(device) if flat else torch.empty(0, dtype=dtype, device=device)
            expected = [from_rank.get(dtype, 0) for from_rank in sizes]
            inbound = torch.empty(sum(expected), dtype=dtype, device=device)
            work = dist.all_to_all_single(inbound, outbound, expected, splits, async_op=True)
            exchange.works.append(work)
            exchange.buffers.append(outbound)  # must live until the exchange is finished
            exchange.received[dtype] = list(inbound.split(expected))
        return exchange


class _Reader:
    """Reads a flat tensor piece by piece."""

    def __init__(self, flat: Tensor) -> None:
        self.flat, self.place = flat, 0

    def take(self, numel: int) -> Tensor:
        self.place += numel
        return self.flat[self.place - numel : self.place]


def _rounds(params: Iterable[Tensor], ranks: int) -> Iterator[list[Tensor]]:
    current: list[Tensor] = []
    num_bytes = 0
    for param in params:
        current.append(param)
        num_bytes += param.numel() * 4 * (1 if is_sharded(param) else ranks)  # whole directions go to every rank
        if num_bytes >= ROUND_BYTES:
            yield current
            current, num_bytes = [], 0
    if current:
        yield current


def spread_rows(value: Tensor | None, like: Tensor, owner: int, param: Tensor) -> Tensor:
    """Splits an owner's state into one part for each rank, for a checkpoint that any number of ranks can load.

    Args:
        value: The state on its owner; None on other ranks.
        like: A tensor of its shape and dtype.
        owner: The owner's rank.
        param: The sharded parameter that the state belongs to; all ranks must call this for the same parameter.

    Returns:
        A DTensor of the state's shape on the parameter's mesh, cut along its first dimension of more than one entry.
    """
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Cut

    assert is_sharded(param)
    mesh, dim = param.device_mesh, _first_of_many(like)
    parts = [_chunk(like.shape[dim], mesh.shape[-1], rank) for rank in _last_coordinates(param)]
    device = wire_device(param)
    sizes = [like.numel() // like.shape[dim] * (end - start) for start, end in parts]
    outbound = torch.empty(0, dtype=like.dtype, device=device)
    rank = dist.get_rank()
    if value is not None:
        outbound = torch.cat([value.narrow(dim, start, end - start).flatten() for start, end in parts]).to(device)
    inbound = torch.empty(sizes[rank], dtype=like.dtype, device=device)
    dist.all_to_all_single(
        inbound,
        outbound,
        [sizes[rank] if other == owner else 0 for other in range(len(sizes))],
        sizes if value is not None else [0] * len(sizes),
    )
    start, end = parts[rank]
    shape = [end - start if i == dim else size for i, size in enumerate(like.shape)]
    where = [Replicate() for _ in mesh.shape[:-1]] + [Cut(dim)]
    wrapped: Tensor = DTensor.from_local(
        inbound.view(shape).to(local(param).device),
        mesh,
        where,
        run_check=False,
        shape=like.shape,
        stride=torch.empty_like(like).stride(),
    )
    return wrapped


def _first_of_many(like: Tensor) -> int:
    # Parts along this dimension are contiguous. torch 2.11 distributes others wrongly when it loads a FULL state dict.
    return next((dim for dim, size in enumerate(like.shape) if size > 1), 0)


def _chunk(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """Returns the rows that DTensor gives a rank, as first and end."""
    each = -(-size // ranks)
    return min(rank * each, size), min((rank + 1) * each, size)


def _last_coordinates(param: Tensor) -> list[int]:
    """Returns each rank's index along the last dimension of a parameter's mesh."""
    assert is_sharded(param)
    places = {int(r): index[-1] for index, r in _enumerate(param.device_mesh.mesh)}
    return [places[rank] for rank in sorted(places)]


def _enumerate(mesh: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    for index in itertools.product(*(range(size) for size in mesh.shape)):
        yield index, mesh[index]


def send_to_first(value: Tensor | None, like: Tensor, owner: int, device: torch.device) -> Tensor | None:
    """Sends state from its owner to rank 0, and returns it there, on the CPU; returns None on other ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    outbound = torch.empty(0, dtype=like.dtype, device=device) if value is None else value.to(device).flatten()
    inbound = torch.empty(like.numel() if rank == 0 else 0, dtype=like.dtype, device=device)
    dist.all_to_all_single(
        inbound,
        outbound,
        [like.numel() if rank == 0 and other == owner else 0 for other in range(ranks)],
        [outbound.numel() if other == 0 else 0 for other in range(ranks)],
    )
    return inbound.view(like.shape).cpu() if rank == 0 else None
