"""Reshards the state of a tensor: for another number of ranks, for other blocks, or for one process.

Momentum and all other state in the tensor's coordinates carries over exactly. Factors are assembled from those of the
old parts. Each contributes in proportion to the entries that it shares with a new block. Correlations that no old
factor contains count as zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_soap.distributed.dtensor import Shard
from hf_soap.linalg import matrices
from hf_soap.rules.base import PREV_PARAM, Rule, StateSpec, moment
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import Layout
from hf_soap.rules.storage import COUNT, decoded

Ranges = tuple[tuple[int, int], ...]
"""(start, end) for each dimension."""


@dataclass(frozen=True)
class Piece:
    """The state of one part of a tensor, as one rank held it.

    Attributes:
        shard: Where the part lies.
        layout: How it was cut.
        state: Tensors by role.
    """

    shard: Shard
    layout: Layout
    state: dict[str, Tensor]


def describe(shard: Shard, layout: Layout) -> Tensor:
    """Encodes shard and layout as one int64 vector, of the same length on all ranks, to be saved with the state."""
    numbers = [len(shard.whole), len(layout.view)]
    for values in (shard.whole, shard.offset, shard.size, shard.largest, layout.view, layout.grid, layout.block):
        numbers += values
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def understand(described: Tensor, state: Mapping[str, Tensor], rule: Rule) -> Piece:
    """Decodes the vector of :func:`describe`, and returns the piece with its state in the form to compute with."""
    dims, modes, *numbers = described.tolist()
    rest = iter(numbers)
    whole, offset, size, largest = (tuple(itertools.islice(rest, dims)) for _ in range(4))
    view, grid, block = (tuple(itertools.islice(rest, modes)) for _ in range(3))
    # The factored sides are those with a saved factor.
    layout = Layout(view, grid, block, tuple(range(modes)))
    specs = rule.state_spec(layout)
    factors = {spec.mode for role, spec in specs.items() if spec.kind == "factor" and role in state}
    layout = replace(layout, sides=tuple(side for side in layout.sides if side in factors))
    return Piece(Shard(whole, offset, size, largest), layout, decoded(state, specs, torch.float32))


def reshard(
    pieces: Sequence[Piece], rule: Rule, layout: Layout, shard: Shard, wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Computes the state of one part of a tensor from the state of other parts that cover it.

    Args:
        pieces: Saved state of all old parts, on one device.
        rule: The rule that the state belongs to.
        layout: How the new part is cut.
        shard: Where it lies.
        wanted: Tensors of the shapes that its state has, by role, ``step`` included.

    Returns:
        State by role, with the shapes of ``wanted`` and the dtypes of the pieces.
    """
    near = [piece for piece in pieces if _overlap(piece.shard, shard)]
    steps = [piece.state["step"].reshape(()) for piece in near]
    step = torch.stack(steps).max() if steps else torch.zeros((), device="cpu")
    dtype = next((value.dtype for piece in near for role, value in piece.state.items() if role != "step"), None)
    state = {
        role: torch.zeros(like.shape, dtype=dtype, device="cpu") for role, like in wanted.items() if role != "step"
    }
    if step > 0:
        known = [Piece(p.shard, p.layout, rule.restate(p.state, p.layout)) for p in near if p.state["step"] > 0]
        specs = {**rule.state_spec(layout), PREV_PARAM: moment(layout)}
        for role, value in state.items():
            spec = specs[role]
            if spec.kind in ("factor", "vector"):
                _fill_axis(value, role, spec, known, layout, shard)
            elif spec.kind == "moment":
                parts = [_part(piece, role, shard) for piece in known if role in piece.state]
                value.copy_(layout.to_blocks(_joined(parts, shard, value.dtype)))
        gradient = state.get("exp_avg", state.get("prev_grad"))
        for role, spec in specs.items():
            if spec.kind == "factor" and spec.mode is not None and gradient is not None and not state[role].any():
                # A side that had no factor starts as from a first gradient.
                matrices.add_gram_(state[role], gradient, spec.mode, beta=0.0, alpha=1.0)
        context = StepContext(layout, (int(step) - rule.traits(layout).first_grad_seeds,), (0,))
        rule.rebuild({role: value for role, value in state.items() if role != PREV_PARAM}, context)
    return {**state, "step": step.to(COUNT)}


def _overlap(one: Shard, other: Shard) -> Ranges | None:
    ranges = tuple(
        (max(a, b), min(a + m, b + n))
        for a, m, b, n in zip(one.offset, one.size, other.offset, other.size, strict=True)
    )
    return ranges if all(first < end for first, end in ranges) else None


def _part(piece: Piece, role: str, shard: Shard) -> tuple[Ranges, Tensor]:
    """Returns the part of a piece's moment that lies within ``shard``, and its ranges."""
    ranges = _overlap(piece.shard, shard) or ()
    tensor = piece.layout.from_blocks(piece.state[role], piece.shard.size)
    own = zip(ranges, piece.shard.offset, strict=True)
    return ranges, tensor[tuple(slice(first - start, end - start) for (first, end), start in own)]


def _joined(parts: Sequence[tuple[Ranges, Tensor]], shard: Shard, dtype: torch.dtype) -> Tensor:
    joined = torch.zeros(shard.size, dtype=dtype, device="cpu")
    for ranges, part in parts:
        where = zip(ranges, shard.offset, strict=True)
        joined[tuple(slice(first - start, end - start) for (first, end), start in where)] = part
    return joined


def _fill_axis(
    target: Tensor, role: str, spec: StateSpec, pieces: Sequence[Piece], layout: Layout, shard: Shard
) -> None:
    """Sums the contributions of old blocks to a factor or vector of each new block."""
    new, axis = _block_ranges(layout, shard), spec.mode
    assert axis is not None
    for piece in pieces:
        old = _block_ranges(piece.layout, piece.shard)
        if role not in piece.state or old is None or new is None or len(old) != len(new):
            continue
        matches = [list(_matches(theirs, ours)) for theirs, ours in zip(old, new, strict=True)]
        for combination in itertools.product(*matches):
            weight = 1.0
            for mode, (theirs, ours, first, end) in enumerate(combination):
                if mode != axis:
                    start, stop = (new[mode][ours]) if spec.is_mean else (old[mode][theirs])
                    weight *= (end - first) / (stop - start)
            theirs, ours, first, end = combination[axis]
            source = piece.state[role][_number([c[0] for c in combination], piece.layout.grid)]
            here = slice(first - new[axis][ours][0], end - new[axis][ours][0])
            there = slice(first - old[axis][theirs][0], end - old[axis][theirs][0])
            block = target[_number([c[1] for c in combination], layout.grid)]
            if target.dim() == 3:
                block[here, here] += weight * source[there, there]
            else:
                block[here] += weight * source[there]


def _matches(old: Sequence[tuple[int, int]], new: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """Yields (index of the old range, index of the new range, start, end) for each overlap."""
    for i, (a, b) in enumerate(old):
        for j, (c, d) in enumerate(new):
            if max(a, c) < min(b, d):
                yield i, j, max(a, c), min(b, d)


def _number(place: Sequence[int], grid: Sequence[int]) -> int:
    number = 0
    for index, count in zip(place, grid, strict=True):
        number = number * count + index
    return number


def _block_ranges(layout: Layout, shard: Shard) -> list[list[tuple[int, int]]] | None:
    """Returns each mode's block ranges in the whole tensor; None if a mode merges a sharded dimension with others."""
    sizes, wholes, offsets = iter(shard.size), iter(shard.whole), iter(shard.offset)
    ranges = []
    for extent, count, block in zip(layout.view, layout.grid, layout.block, strict=True):
        covered, start, first = 1, 0, True
        while covered < extent or first:
            size, whole, offset = next(sizes, 1), next(wholes, 1), next(offsets, 0)
            if not first and size != whole:
                return None
            start = offset if first else start * size
            covered, first = covered * size, False
        ends = [(start + i * block, start + min((i + 1) * block, extent)) for i in range(count)]
        ranges.append([(a, b) for a, b in ends if a < b])
    return ranges if math.prod(layout.view) else None
