"""How tensors are cut into blocks and put together again."""

import itertools
import math

import pytest
import torch
from generated import cases
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_soap.reference.soap import block_grid, merged_shape, zero_padded
from hf_soap.rules.context import StepContext, adjacent
from hf_soap.rules.layout import Layout, merge_shape, plan_layout

shapes = st.lists(st.integers(1, 7), max_size=5).map(tuple)


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A tensor whose entries are all different and none is zero."""
    return torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "limit", "merged"),
    [
        ((64, 3, 7, 7), 10000, (9408,)),
        ((64, 3, 7, 7), 1000, (192, 49)),
        ((64, 3, 7, 7), 64, (64, 21, 7)),
        ((64, 3, 7, 7), 10, (64, 3, 7, 7)),
        ((2, 3, 4), 6, (6, 4)),
        ((2, 3, 4), 5, (2, 3, 4)),
        ((2, 3, 4), 24, (24,)),
        ((1, 5, 1, 6), 5, (5, 6)),
        ((9, 1, 1), 5, (9,)),
        ((1, 1, 1), 5, (1,)),
        ((9, 9), 5, (9, 9)),
    ],
)
def test_merge_shape(shape: tuple[int, ...], limit: int, merged: tuple[int, ...]) -> None:
    assert merge_shape(shape, limit) == merged


@given(shape=shapes.filter(lambda shape: len(shape) > 2), limit=st.integers(1, 60))
@cases()
def test_merge_shape_is_the_textbooks(shape: tuple[int, ...], limit: int) -> None:
    merged = merge_shape(shape, limit)
    assert merged == merged_shape(shape, limit)
    assert math.prod(merged) == math.prod(shape)


def planned(shape: tuple[int, ...], **options: object) -> Layout:
    return plan_layout(shape, **{"max_precond_dim": 100, **options})


@pytest.mark.parametrize(
    ("shape", "options", "layout"),
    [
        pytest.param((4, 6), {}, Layout((4, 6), (1, 1), (4, 6), (0, 1)), id="matrix"),
        pytest.param((4, 101), {}, Layout((4, 101), (1, 1), (4, 101), (0,)), id="long side"),
        pytest.param((4, 100), {}, Layout((4, 100), (1, 1), (4, 100), (0, 1)), id="longest side that is factored"),
        pytest.param((101, 101), {}, Layout((101, 101), (1, 1), (101, 101), ()), id="no side"),
        pytest.param((4, 6), {"max_precond_dim": 0}, Layout((4, 6), (1, 1), (4, 6), ()), id="limit 0"),
        pytest.param((4, 6), {"factored": False}, Layout((4, 6), (1, 1), (4, 6), ()), id="Adam"),
        pytest.param((1, 6), {}, Layout((1, 6), (1, 1), (1, 6), (1,)), id="a side of one entry has no basis"),
        pytest.param((1, 6), {"max_aspect_ratio": 8.0}, Layout((6,), (1,), (6,), ()), id="a row is a vector"),
        pytest.param((6, 1), {"max_aspect_ratio": 8.0}, Layout((6,), (1,), (6,), ()), id="a column is a vector"),
        pytest.param(
            (1, 6),
            {"precondition_1d": True, "max_aspect_ratio": 8.0},
            Layout((6,), (1,), (6,), (0,)),
            id="a row, factored as a vector",
        ),
        pytest.param(
            (4, 32), {"max_aspect_ratio": 8.0}, Layout((4, 32), (1, 1), (4, 32), (0, 1)), id="as flat as the ratio"
        ),
        pytest.param(
            (4, 33), {"max_aspect_ratio": 8.0}, Layout((4, 33), (1, 1), (4, 33), (0,), (1,)), id="flatter, wide"
        ),
        pytest.param(
            (33, 4), {"max_aspect_ratio": 8.0}, Layout((33, 4), (1, 1), (33, 4), (1,), (0,)), id="flatter, tall"
        ),
        pytest.param(
            (96, 2, 5),
            {"max_aspect_ratio": 8.0},
            Layout((96, 2, 5), (1, 1, 1), (96, 2, 5), (1, 2), (0,)),
            id="a depthwise convolution's channels outweigh it",
        ),
        pytest.param(
            (3, 4, 5),
            {"stacked_matrices": True},
            Layout((12, 5), (3, 1), (4, 5), (0, 1), stack=3),
            id="a stack of matrices",
        ),
        pytest.param(
            (4, 4, 5), {"stacked_matrices": True}, Layout((4, 4, 5), (1, 1, 1), (4, 4, 5), (0, 1, 2)), id="no stack"
        ),
        pytest.param(
            (3, 8, 5),
            {"stacked_matrices": True, "block_size": 4},
            Layout((24, 5), (6, 2), (4, 3), (0, 1), stack=3),
            id="a stack of matrices in blocks",
        ),
        pytest.param(
            (3, 7, 5),
            {"stacked_matrices": True, "block_size": 4},
            Layout((21, 5), (21, 2), (1, 3), (1,), stack=3),
            id="no block of a stack holds rows of two matrices",
        ),
        pytest.param(
            (3, 70, 5),
            {"stacked_matrices": True, "max_precond_dim": 4},
            Layout((3, 70, 5), (1, 1, 1), (3, 70, 5), ()),
            id="a stack without factors",
        ),
        pytest.param((6,), {}, Layout((6,), (1,), (6,), ()), id="vector"),
        pytest.param((6,), {"precondition_1d": True}, Layout((6,), (1,), (6,), (0,)), id="factored vector"),
        pytest.param((), {}, Layout((1,), (1,), (1,), ()), id="scalar"),
        pytest.param((), {"precondition_1d": True, "block_size": 2}, Layout((1,), (1,), (1,), ()), id="scalar, 1-D"),
        pytest.param((4, 6), {"one_sided": True}, Layout((4, 6), (1, 1), (4, 6), (0,)), id="one side, wide"),
        pytest.param((6, 4), {"one_sided": True}, Layout((6, 4), (1, 1), (6, 4), (1,)), id="one side, tall"),
        pytest.param((5, 5), {"one_sided": True}, Layout((5, 5), (1, 1), (5, 5), (0,)), id="one side, square"),
        pytest.param((1, 6), {"one_sided": True}, Layout((1, 6), (1, 1), (1, 6), ()), id="one side of one entry"),
        pytest.param(
            (24, 4),
            {"one_sided": True, "square_blocks": True},
            Layout((24, 4), (6, 1), (4, 4), (1,)),
            id="one side of square blocks: that of the matrix",
        ),
        pytest.param(
            (200, 300), {"one_sided": True}, Layout((200, 300), (1, 1), (200, 300), ()), id="one side, both long"
        ),
        pytest.param(
            (3, 4, 5), {"one_sided": True}, Layout((3, 4, 5), (1, 1, 1), (3, 4, 5), (0, 1, 2)), id="one side, 3-D"
        ),
        pytest.param((8, 1024), {"merge_dims": True}, Layout((8, 1024), (1, 1), (8, 1024), (0,)), id="LoRA unmerged"),
        pytest.param((8, 10), {"merge_dims": True}, Layout((8, 10), (1, 1), (8, 10), (0, 1)), id="matrix unmerged"),
        pytest.param((9, 5, 4, 3), {"merge_dims": True}, Layout((45, 12), (1, 1), (45, 12), (0, 1)), id="merged"),
        pytest.param((9, 3, 3), {"merge_dims": True}, Layout((81,), (1,), (81,), (0,)), id="merged to a vector"),
        pytest.param(
            (9, 5, 4, 3),
            {"merge_dims": True, "one_sided": True},
            Layout((45, 12), (1, 1), (45, 12), (1,)),
            id="merged to a matrix with one side",
        ),
        pytest.param((20, 30), {"block_size": 10}, Layout((20, 30), (2, 3), (10, 10), (0, 1)), id="even blocks"),
        pytest.param((13, 24), {"block_size": 8}, Layout((13, 24), (2, 3), (7, 8), (0, 1)), id="balanced blocks"),
        pytest.param(
            (4, 200), {"block_size": 100}, Layout((4, 200), (1, 2), (4, 100), (0, 1)), id="cut below the limit"
        ),
        pytest.param(
            (4, 400), {"block_size": 200}, Layout((4, 400), (1, 2), (4, 200), (0,)), id="cut above the limit"
        ),
        pytest.param((30,), {"block_size": 10}, Layout((30,), (1,), (30,), ()), id="vectors stay whole"),
        pytest.param(
            (30,), {"block_size": 10, "precondition_1d": True}, Layout((30,), (3,), (10,), (0,)), id="cut vector"
        ),
        pytest.param(
            (20, 30), {"block_size": 10, "factored": False}, Layout((20, 30), (1, 1), (20, 30), ()), id="uncut"
        ),
        pytest.param((20, 50), {"square_blocks": True}, Layout((20, 50), (1, 3), (20, 17), (0, 1)), id="square"),
        pytest.param(
            (50, 20), {"square_blocks": True, "block_size": 10}, Layout((50, 20), (5, 2), (10, 10), (0, 1)), id="both"
        ),
        pytest.param(
            (5, 60),
            {"square_blocks": True, "max_aspect_ratio": 8.0},
            Layout((5, 60), (1, 1), (5, 60), (0,), (1,)),
            id="too flat for square blocks",
        ),
        pytest.param(
            (2, 4, 8),
            {"square_blocks": True, "stacked_matrices": True},
            Layout((8, 8), (2, 2), (4, 4), (0, 1), stack=2),
            id="square blocks of a stack",
        ),
        pytest.param((3, 2), {"block_size": 1}, Layout((3, 2), (3, 2), (1, 1), ()), id="blocks of one entry"),
    ],
)
def test_plan_layout(shape: tuple[int, ...], options: dict[str, object], layout: Layout) -> None:
    assert planned(shape, **options) == layout


def test_factor_numel_counts_what_is_factored() -> None:
    assert planned((4, 6)).factor_numel() == 16 + 36
    assert planned((4, 6), one_sided=True).factor_numel() == 16
    assert planned((20, 30), block_size=10).factor_numel() == 6 * (100 + 100)
    assert planned((6,)).factor_numel() == 0


@given(shape=shapes, block_size=st.none() | st.integers(1, 8), merge_dims=st.booleans(), vectors=st.booleans())
@cases()
def test_blocks_are_the_textbooks_and_go_back(
    shape: tuple[int, ...], block_size: int | None, merge_dims: bool, vectors: bool
) -> None:
    layout = plan_layout(
        shape, max_precond_dim=20, block_size=block_size, merge_dims=merge_dims, precondition_1d=vectors
    )
    tensor = numbered(shape)
    blocks = layout.to_blocks(tensor)
    cut = block_size if len(shape) > 1 or vectors else None
    block_shape, slices = block_grid(layout.view, cut)
    expected = torch.stack([zero_padded(tensor.reshape(layout.view)[piece], block_shape) for piece in slices])
    assert layout.blocks == len(slices)
    assert torch.equal(blocks, expected)
    assert layout.padded == bool((blocks == 0).any())
    assert torch.equal(layout.from_blocks(blocks, shape), tensor)
    two = torch.cat([blocks, blocks + 1000])  # padding no longer zero in the second
    trimmed = layout.trim(two)
    assert torch.equal(trimmed[: layout.blocks], blocks)
    assert torch.equal(trimmed[layout.blocks :], torch.where(blocks == 0, 0, blocks + 1000))


def test_one_block_is_a_view() -> None:
    tensor = numbered((4, 6))
    blocks = planned((4, 6)).to_blocks(tensor)
    assert blocks.data_ptr() == tensor.data_ptr()
    assert planned((4, 6)).from_blocks(blocks, (4, 6)).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_blocks_do_not_depend_on_memory_order(memory_format: torch.memory_format) -> None:
    tensor = numbered((5, 4, 3, 2))
    layout = planned((5, 4, 3, 2), block_size=3)
    assert torch.equal(layout.to_blocks(tensor.to(memory_format=memory_format)), layout.to_blocks(tensor))


@given(flags=st.lists(st.booleans(), max_size=12), longest=st.none() | st.integers(1, 5))
@cases()
def test_adjacent_covers_the_set_flags_in_order(flags: list[bool], longest: int | None) -> None:
    runs = list(adjacent(flags, longest))
    assert [i for first, end in runs for i in range(first, end)] == [i for i, flag in enumerate(flags) if flag]
    assert all(0 < end - first <= (longest or len(flags)) for first, end in runs)
    # Cut only where a flag is unset or the run before is full: fewer, larger batches are the point.
    assert all(end < start or end - first == longest for (first, end), (start, _) in itertools.pairwise(runs))


def context(layout: Layout, *t: int) -> StepContext:
    return StepContext(layout, t, tuple(range(10, 10 + len(t))))


def test_a_number_per_tensor_is_spread_over_its_blocks() -> None:
    layout = planned((20, 30), block_size=10)
    like = torch.zeros(12, 10, 10, dtype=torch.float64)
    spread = context(layout, 1, 2).per_block(lambda t: t / 10, like)
    assert spread.dtype == torch.float64
    assert torch.equal((like + spread)[:, 3, 4], torch.tensor([0.1] * 6 + [0.2] * 6, dtype=torch.float64))
    assert context(layout, 2, 2).per_block(lambda t: t / 10, like) == 0.2


def test_norms_are_a_tensors_over_all_of_its_blocks() -> None:
    layout = planned((13, 24), block_size=8)
    tensors = [numbered((13, 24)).double(), torch.ones(13, 24, dtype=torch.float64)]
    blocks = torch.cat([layout.to_blocks(tensor) for tensor in tensors])
    sums = context(layout, 1, 1).tensor_square_sum(blocks)
    expected = [tensor.square().sum() for tensor in tensors for _ in range(layout.blocks)]
    torch.testing.assert_close(sums.flatten(), torch.stack(expected))
    assert (blocks / sums).shape == blocks.shape


def test_runs_slice_blocks_and_keep_each_tensors_numbers() -> None:
    layout = planned((20, 30), block_size=10)
    runs = list(context(layout, 1, 2, 3, 4).subbatches([True, False, True, True]))
    assert [blocks for blocks, _ in runs] == [slice(0, 6), slice(12, 24)]
    assert [part.t for _, part in runs] == [(1,), (3, 4)]
    assert [part.index for _, part in runs] == [(10,), (12, 13)]


def test_parts_of_a_stack_that_are_cut_within_its_matrices_are_blocks_of_one_matrix_each() -> None:
    """Where such a cut is uneven, the smaller part was padded at its end, and blocks held rows of two matrices."""
    options = {"max_precond_dim": 100, "max_aspect_ratio": 8.0, "stacked_matrices": True}
    even = plan_layout((3, 10, 7), part=(3, 5, 7), **options)  # type: ignore[arg-type]
    assert (even.stack, even.block) == (3, (5, 7))
    uneven = plan_layout((3, 9, 7), part=(3, 5, 7), **options)  # type: ignore[arg-type]
    assert uneven.stack == 1
    rows = torch.arange(3.0)[:, None, None].expand(3, 4, 7).contiguous()
    blocks = uneven.fitted((3, 5, 7), (3, 4, 7)).to_blocks(rows)
    assert torch.equal(blocks[:, :, :4], rows.unsqueeze(0))
