"""How a parameter is cut into blocks of one shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

FACTOR_RATIO = 4
"""A factor of a shard has at most this many times the shard's entries; a longer side is cut into blocks."""

SMALLEST_CUT = 8
"""If the blocks would have to be shorter than this, the side of a shard gets no factor."""


@dataclass(frozen=True)
class Layout:
    """How one tensor becomes a batch of same-shape blocks.

    Attributes:
        view: Shape after merging dimensions; reshaping the parameter to it moves no data.
        grid: Number of blocks along each dimension of ``view``.
        block: Shape (d_1, ..., d_k) of one block; grid * block exceeds ``view`` if the last block is padded.
        sides: Modes that have a Kronecker factor, ascending; the others keep an identity basis.
        too_long: Modes that would have one if they were not too long compared with the others.
        stack: Number of matrices that the tensor is a stack of; each consists of equally many adjacent blocks.
    """

    view: tuple[int, ...]
    grid: tuple[int, ...]
    block: tuple[int, ...]
    sides: tuple[int, ...]
    too_long: tuple[int, ...] = ()
    stack: int = 1

    @cached_property
    def blocks(self) -> int:
        """Number of blocks of one tensor."""
        return math.prod(self.grid)

    @cached_property
    def numel(self) -> int:
        """Number of entries of one tensor, without padding."""
        return math.prod(self.view)

    @cached_property
    def matrix_numel(self) -> int:
        """Number of entries of one matrix of a stack, or of the tensor, without padding."""
        if self.stack == 1:
            return self.numel
        return self.grid[0] // self.stack * self.block[0] * math.prod(self.view[1:])  # no row of a stack is padding

    @cached_property
    def whole(self) -> bool:
        """Whether the tensor is a single block without padding."""
        return self.blocks == 1 and not self.padded

    @cached_property
    def padded(self) -> bool:
        """Whether some blocks hold entries that belong to no entry of the parameter."""
        return any(g * b != v for g, b, v in zip(self.grid, self.block, self.view, strict=True))

    def fitted(self, shape: Sequence[int], part: Sequence[int]) -> Layout:
        """Returns the layout of a ``part`` of a tensor of ``shape``, which is padded to the same blocks."""
        if not math.prod(shape):
            return self  # a smaller part is empty, too
        view, sizes = [], iter(zip(shape, part, strict=True))
        for extent in self.view:
            covered, size = 1, 1
            while covered < extent:
                of_shape, of_part = next(sizes)
                covered, size = covered * of_shape, size * of_part
            view.append(size)
        return replace(self, view=tuple(view)) if shape else self

    def factor_numel(self) -> int:
        """Number of entries of all factors of one tensor; the bases have as many."""
        return self.blocks * sum(self.block[side] ** 2 for side in self.sides)

    def to_blocks(self, tensor: Tensor) -> Tensor:
        """Cuts a tensor into (blocks, d_1, ..., d_k), zero-padded; a view if there is one block."""
        tensor = tensor.reshape(self.view)
        if self.whole:
            return tensor.unsqueeze(0)
        if self.padded:
            excess = [g * b - v for g, b, v in zip(self.grid, self.block, self.view, strict=True)]
            tensor = F.pad(tensor, [n for e in reversed(excess) for n in (0, e)])
        k = len(self.grid)
        split = tensor.reshape([n for pair in zip(self.grid, self.block, strict=True) for n in pair])
        return split.permute(*range(0, 2 * k, 2), *range(1, 2 * k, 2)).reshape(self.blocks, *self.block)

    def from_blocks(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:
        """Assembles a tensor of ``shape`` from (blocks, d_1, ..., d_k), without the padding."""
        if self.blocks == 1 and not self.padded:
            return blocks.reshape(tuple(shape))
        k = len(self.grid)
        order = [n for i in range(k) for n in (i, k + i)]
        whole = blocks.reshape(*self.grid, *self.block).permute(order)
        whole = whole.reshape([g * b for g, b in zip(self.grid, self.block, strict=True)])
        if self.padded:
            whole = whole[tuple(slice(v) for v in self.view)]
        return whole.reshape(tuple(shape))

    def entries(self) -> Tensor:
        """Returns the number of entries of each block without padding, (blocks,), on the CPU."""
        return self.to_blocks(torch.ones(self.view, device="cpu")).flatten(1).sum(1)

    def trim(self, blocks: Tensor) -> Tensor:
        """Zeroes the padding of (tensors * blocks, d_1, ..., d_k), so that norms include only real entries."""
        if not self.padded:
            return blocks
        tensors = blocks.split(self.blocks)
        return torch.cat([self.to_blocks(self.from_blocks(one, self.view)) for one in tensors])


def merge_shape(shape: Sequence[int], limit: int, ratio: float | None = None) -> tuple[int, ...]:
    """Merges neighbouring dimensions from the left while their product n stays small enough for a factor.

    Args:
        shape: Shape of a tensor.
        limit: Largest n.
        ratio: If given, the n x n factor of a merged dimension has at most this many times the tensor's entries.

    Returns:
        The merged shape.

    Source:
        The greedy rule of the SOAP paper's code for convolutions (arXiv:2409.11321): on overflow the running
        product is emitted and restarts at this dimension.
    """
    numel = math.prod(shape)
    largest = limit if ratio is None else min(limit, math.isqrt(int(ratio * numel)))
    merged: list[int] = []
    running = 1
    for size in shape:
        if running * size <= largest:
            running *= size
        elif running == 1:
            merged.append(size)
        else:
            merged.append(running)
            running = size
    if running != 1 or not merged:
        merged.append(running)
    return tuple(merged)


def uncut(shape: Sequence[int]) -> Layout:
    """Returns the layout of a tensor that is one block without factors."""
    view = tuple(shape) or (1,)
    return Layout(view, (1,) * len(view), view, ())


def is_vector(shape: Sequence[int]) -> bool:
    """Whether a tensor has at most one dimension of more than one entry, as N x 1 has."""
    return sum(size > 1 for size in shape) < 2


def is_stack(shape: Sequence[int]) -> bool:
    """Whether a tensor looks like a stack of matrices: three dimensions, of which the first is the shortest.

    Mixtures of experts store their weights in this form, (experts, rows, columns). Convolutions have their short
    dimensions last.
    """
    return len(shape) == 3 and 0 < shape[0] < min(shape[1:])


def plan_layout(
    shape: Sequence[int],
    *,
    max_precond_dim: int,
    max_aspect_ratio: float | None = None,
    stacked_matrices: bool = False,
    merge_dims: bool = False,
    precondition_1d: bool = False,
    one_sided: bool = False,
    block_size: int | None = None,
    square_blocks: bool = False,
    factored: bool = True,
    part: Sequence[int] | None = None,
) -> Layout:
    """Decides how a tensor is cut and which of its sides are factored.

    Args:
        shape: Shape of the parameter; a scalar counts as a vector of one entry.
        max_precond_dim: A longer side keeps an identity basis.
        max_aspect_ratio: A side also keeps an identity basis if it is longer than this many times the product of all
            other sides, such as the long side of a flat matrix: its factor would be larger than the tensor by as much.
            1 x N and N x 1 count as vectors. None sets no limit.
        stacked_matrices: Cut a stack of matrices (:func:`is_stack`) into its matrices.
        merge_dims: Merge neighbouring dimensions of a tensor with more than two of them, as long as the factors stay
            within both limits. A matrix is never merged.
        precondition_1d: Factor vectors too, whatever their aspect ratio.
        one_sided: Factor only the shorter side of a matrix (the left one if they are equal), also in its blocks.
        block_size: Cut sides longer than this into equal blocks, the last one zero-padded.
        square_blocks: Cut the longer side of a matrix so that blocks are about square, unless it is flatter than
            ``max_aspect_ratio``: it then has a factor on its short side only.
        factored: False keeps every basis at the identity, which makes SOAP Adam.
        part: Shape of the largest part on a rank, if the tensor is sharded. The whole tensor decides which sides are
            too long for a factor; ``one_sided`` chooses the shorter side of the part. Factors that are larger than the
            part by more than ``FACTOR_RATIO`` are cut into blocks.

    Returns:
        The layout of the tensor, or of the part.
    """
    vector = len(shape) < 2 or (max_aspect_ratio is not None and is_vector(shape))
    stacked = stacked_matrices and factored and not vector and is_stack(shape)
    if stacked and part is not None:  # a smaller part of each matrix cannot be padded to the same blocks
        stacked = all(size % largest == 0 for size, largest in zip(shape[1:], part[1:], strict=True))

    def cut(size: Sequence[int]) -> Layout:
        view = (math.prod(size),) if vector else tuple(size)
        if stacked:
            view = (size[0] * size[1], size[2])
        elif merge_dims and len(view) > 2:
            view = merge_shape(view, max_precond_dim, max_aspect_ratio)
        longest = block_size
        if square_blocks and (stacked or len(view) == 2):
            short, long = sorted(size[1:] if stacked else view)
            if max_aspect_ratio is None or long <= max_aspect_ratio * short:
                longest = max(1, min(short, block_size or short))
        grid = [1 for _ in view]
        if factored and longest is not None and (not vector or precondition_1d):
            grid = [max(1, -(-extent // longest)) for extent in view]
        if stacked:
            grid[0] = size[0] * _even_cuts(size[1], longest or size[1])
        block = tuple(-(-extent // count) for extent, count in zip(view, grid, strict=True))
        sides: tuple[int, ...] = ()
        if factored and (not vector or precondition_1d):
            sides = tuple(i for i, n in enumerate(block) if 1 < n <= max_precond_dim)
        if one_sided and len(block) == 2:
            rows, columns = size[1:] if stacked else view
            sides = tuple(side for side in sides if side == (0 if rows <= columns else 1))
        too_long: tuple[int, ...] = ()
        if max_aspect_ratio is not None and not vector:
            too_long = tuple(i for i in sides if block[i] ** 2 > max_aspect_ratio * math.prod(block))
        kept = tuple(i for i in sides if i not in too_long)
        return Layout(view, tuple(grid), block, kept, too_long, stack=size[0] if stacked else 1)

    layout = cut(shape)
    if part is not None:
        whole, layout = layout, cut(part)
        # If part and whole merge differently, their modes do not correspond.
        alike = len(whole.view) == len(layout.view)
        too_long = whole.too_long if alike else layout.too_long
        sides = tuple(sorted({*layout.sides, *layout.too_long} - {*too_long}))
        layout = _limit_factors(replace(layout, sides=sides, too_long=too_long))
    if stacked and not layout.sides:
        return uncut(shape if part is None else part)
    return layout


def _even_cuts(size: int, longest: int) -> int:
    """Returns into how many equal parts of at most ``longest`` a size can be cut; 1 if no small number divides it."""
    needed = -(-size // max(1, longest))
    return next((count for count in range(needed, 4 * needed) if size % count == 0), 1)


def _limit_factors(layout: Layout) -> Layout:
    grid, block, sides = list(layout.grid), list(layout.block), list(layout.sides)
    for side in sorted(layout.sides, key=lambda i: block[i], reverse=True):
        longest = FACTOR_RATIO * math.prod(block) // block[side]
        if longest >= block[side]:
            continue
        if longest < SMALLEST_CUT:
            sides.remove(side)
        elif side == 0 and layout.stack > 1:  # no block may hold rows of two matrices
            grid[side] = grid[side] * _even_cuts(block[side], longest)
            block[side] = layout.view[side] // grid[side]
        else:
            grid[side] = -(-layout.view[side] // longest)
            block[side] = -(-layout.view[side] // grid[side])
    return replace(layout, grid=tuple(grid), block=tuple(block), sides=tuple(sides))
