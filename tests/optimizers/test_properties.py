"""Properties that hold for all shapes, settings and texts, on cases that hypothesis generates."""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from family import TABLE, Row
from generated import cases, dtypes, in_order, noise, orders, parameter, shapes
from helpers import fresh_state
from hypothesis import assume, example, given
from hypothesis import strategies as st
from problems import largest_difference
from torch import Tensor
from torch.nn import Parameter

from hf_soap import SOAP
from hf_soap.checkpoint import reshard
from hf_soap.config.options import option_fields, parse_optim_args
from hf_soap.distributed.dtensor import Shard
from hf_soap.optimizers.names import ENTRIES
from hf_soap.reference.soap import ReferenceSOAP
from hf_soap.rules.base import Rule
from hf_soap.rules.context import StepContext
from hf_soap.rules.elementwise import AdamWRule
from hf_soap.rules.layout import Layout, plan_layout
from hf_soap.rules.soap import SoapRule

# ---------------------------------------------------------------------------------------------------------------------
# Shapes and memory
# ---------------------------------------------------------------------------------------------------------------------


def steps(row: Row, params: list[Parameter], grad_order: str, *, count: int = 4, **options: Any) -> None:
    optimizer = row(params, **options)
    for step in range(count):
        for place, param in enumerate(params):
            grad = noise(tuple(param.shape), 100 * step + place) + 0.5 * param.detach().double()
            param.grad = in_order(grad.to(param.dtype), grad_order)
        optimizer.step()


@given(st.sampled_from(sorted(TABLE)), st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=4), orders, orders)
@cases(0.12)
def test_any_shape_in_any_memory_order(name: str, members: Any, weights: str, grads: str) -> None:
    """Where entries lie in memory changes no more than rounding, and every entry moves and stays finite."""
    plain, ordered = (
        [parameter(shape, dtype, order, i) for i, (shape, dtype) in enumerate(members)]
        for order in ("contiguous", weights)
    )
    steps(TABLE[name], plain, "contiguous", nonfinite="off")
    steps(TABLE[name], ordered, grads, nonfinite="off")
    for i, (one, other) in enumerate(zip(plain, ordered, strict=True)):
        start = noise(tuple(one.shape), i).to(one.dtype)
        assert one.isfinite().all()
        assert not one.numel() or not torch.equal(one, start)
        assert one.shape == other.shape == start.shape
        assert other.isfinite().all()
        # Factors of deficient rank leave directions free in which rounding decides; the sizes of steps agree.
        moved, others = ((each.detach().double() - start.double()).norm() for each in (one, other))
        assert abs(moved - others) <= 0.5 * max(moved, others) + 1e-3


@pytest.mark.parametrize("shape", [(1, 257), (300, 2), (257,), (131, 1)])
@pytest.mark.parametrize("name", ["soap", "shampoo", "kl-shampoo", "mars-shampoo", "mars-soap"])
def test_thin_tensors(name: str, shape: tuple[int, ...]) -> None:
    param = parameter(shape, torch.float32, "contiguous", 0)
    start = param.detach().clone()
    steps(TABLE[name], [param], "contiguous", count=3)
    assert param.isfinite().all()
    assert (param - start).abs().max() > 1e-4


square = st.integers(2, 6).flatmap(lambda n: st.sampled_from([(n, n), (n,), (3, 3, 3)]))


@given(
    st.lists(square, min_size=1, max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "betas": st.sampled_from([(0.9, 0.95), (0.5, 0.99)]),
            "precondition_frequency": st.integers(1, 4),
            "stagger": st.booleans(),
            "normalize_grads": st.booleans(),
            "correct_bias": st.booleans(),
            "precondition_1d": st.booleans(),
            "include_current": st.booleans(),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "shampoo_beta": st.sampled_from([0.8, 0.99]),
        },
    ),
)
@cases(0.1)
def test_any_settings_follow_the_textbook(members: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    """On gradients of full rank, where rounding is all that two correct computations differ by."""
    assume(not (options.get("precondition_1d") and any(len(shape) == 1 for shape in members)))
    settings = {"lr": 0.05, "eps": 1e-3, "refresh_growth": 0.0, **options}
    difference = largest_difference(
        members, lambda params: SOAP(params, **settings), lambda weights: ReferenceSOAP(weights, **settings), steps=8
    )
    assert difference < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Blocks, and parts of tensors
# ---------------------------------------------------------------------------------------------------------------------

cuts = st.fixed_dictionaries(
    {
        "max_precond_dim": st.integers(0, 30),
        "block_size": st.none() | st.integers(1, 9),
        "merge_dims": st.booleans(),
        "precondition_1d": st.booleans(),
        "one_sided": st.booleans(),
        "max_aspect_ratio": st.none() | st.just(8.0),
        "stacked_matrices": st.booleans(),
        "parts": st.none() | st.integers(1, 3),
    }
)


@given(shapes, cuts, orders)
@cases(1.6)
def test_blocks_go_back(shape: tuple[int, ...], options: dict[str, Any], order: str) -> None:
    parts, whole = options.pop("parts"), shape
    if parts is not None and shape:
        shape = (-(-shape[0] // parts), *shape[1:])
    layout = plan_layout(whole, part=shape if parts else None, **options)
    tensor = in_order(torch.arange(1.0, 1 + math.prod(shape)).view(shape), order)
    blocks = layout.to_blocks(tensor)
    assert blocks.shape == (layout.blocks, *layout.block)
    assert torch.equal(layout.from_blocks(blocks, shape), tensor)
    assert int(blocks.count_nonzero()) == layout.numel == tensor.numel()
    assert torch.equal(layout.trim(blocks + 1) > 1, blocks > 0)
    assert all(layout.block[side] <= options["max_precond_dim"] for side in layout.sides)
    smaller = tuple(min(size, 3) for size in shape)
    part, cut = layout.fitted(shape, smaller), tensor[tuple(slice(size) for size in smaller)]
    if tensor.numel():
        assert part.view == layout.view or math.prod(part.view) == cut.numel()
    else:
        assert part == layout


def parts_of(shape: tuple[int, ...], count: int) -> list[Shard]:
    """As torch cuts dimension 0: equal chunks, the last ones smaller or empty."""
    each = max(1, -(-shape[0] // count))
    firsts = [min(i * each, shape[0]) for i in range(count + 1)]
    return [
        Shard(shape, (a, *[0] * (len(shape) - 1)), (b - a, *shape[1:]), (each, *shape[1:]))
        for a, b in pairwise(firsts)
        if b > a
    ]


def cut_alike(shard: Shard, **options: Any) -> Layout:
    return plan_layout(shard.whole, part=shard.largest, **options).fitted(shard.largest, shard.size)


def piece(rule: Rule, shard: Shard, layout: Layout, grads: list[Tensor]) -> reshard.Piece:
    here = tuple(slice(a, a + n) for a, n in zip(shard.offset, shard.size, strict=True))
    state = fresh_state(rule, layout)
    seeds = rule.traits(layout).first_grad_seeds
    if seeds:
        rule.seed(layout.to_blocks(grads[0][here]), state, StepContext(layout, (0,), (0,)))
    for t, grad in enumerate(grads[seeds:], start=1):
        rule.update(layout.to_blocks(grad[here]), state, StepContext(layout, (t,), (0,)))
    return reshard.Piece(shard, layout, {**state, "step": torch.tensor(float(len(grads)))})


def again(
    pieces: list[reshard.Piece], rule: Rule, shards: list[Shard], options: dict[str, Any]
) -> list[reshard.Piece]:
    made = []
    for shard in shards:
        layout = cut_alike(shard, **options)
        wanted = fresh_state(rule, layout, device="meta")
        made.append(
            reshard.Piece(
                shard, layout, reshard.reshard(pieces, rule, layout, shard, {**wanted, "step": torch.zeros(())})
            )
        )
    return made


matrices = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
blocked = st.fixed_dictionaries(
    {"max_precond_dim": st.sampled_from([0, 4, 100]), "block_size": st.none() | st.integers(2, 5)}
)


@given(matrices, st.tuples(*[st.integers(1, 5)] * 2), st.tuples(blocked, blocked), st.booleans(), st.integers(0, 99))
@cases(0.5)
def test_parts_of_any_number_become_parts_of_any_other(
    shape: tuple[int, ...], counts: tuple[int, int], options: Any, factored: bool, seed: int
) -> None:
    """There and back: momentum exactly, factors as symmetric as they were and with bases that are orthonormal."""
    if factored:
        rule: Rule = SoapRule(beta1=0.9, beta2=0.9, shampoo_beta=0.9, eps=1e-8, precondition_frequency=2)
    else:
        rule, options = AdamWRule(beta1=0.9, beta2=0.9, eps=1e-8), [{"max_precond_dim": 0}] * 2
    grads = [noise(shape, seed + i) for i in range(3)]
    first = [piece(rule, shard, cut_alike(shard, **options[0]), grads) for shard in parts_of(shape, counts[0])]
    other = again(first, rule, parts_of(shape, counts[1]), options[1])
    back = again(other, rule, [one.shard for one in first], options[0])
    for one, two in zip(first, back, strict=True):
        before, after = (rule.restate(each.state, each.layout) for each in (one, two))
        torch.testing.assert_close(after["exp_avg"], before["exp_avg"], rtol=1e-9, atol=1e-11)
        assert two.state["step"] == 3
        if not factored:
            assert torch.equal(after["exp_avg_sq"], before["exp_avg_sq"])
        assert all(value.isfinite().all() for value in two.state.values())
        for side in two.layout.sides:
            factor, basis = after[f"factor_{side}"], two.state[f"basis_{side}"]
            torch.testing.assert_close(factor, factor.mT)
            torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[-1]).double().expand_as(basis))
            assert torch.linalg.eigvalsh(factor).min() > -1e-9
    described = [reshard.understand(reshard.describe(p.shard, p.layout), p.state, rule) for p in other]
    assert [(p.shard, p.layout) for p in described] == [(p.shard, p.layout) for p in other]


# ---------------------------------------------------------------------------------------------------------------------
# optim_args
# ---------------------------------------------------------------------------------------------------------------------

entries = st.sampled_from(list(ENTRIES.values()))
words = st.sampled_from(
    [
        *(
            "betas=",
            "(0.9,",
            "0.95)",
            "adam_modules=",
            "modules=",
            "{a: {lr: 1}}",
            "{'@head': {",
            "rule: adam",
            ": ",
            "}}",
            "eps=",
            "block_size=",
            "precondition_frequency=",
            "shampoo_beta=",
        ),
        *(
            "=",
            ",",
            "'",
            '"',
            "\\",
            "(",
            ")",
            "[",
            "]",
            "{",
            "}",
            "{9999999999}",
            "a+",
            "|",
            "^",
            "none",
            "nan",
            "inf",
        ),
        *(
            "-1",
            "0",
            "1",
            "0.5",
            "1e400",
            "true",
            " ",
            "9" * 30,
            "\0",
            "\n",
            "é",
            "\ud800",
            "lr=",
            "(?P<",
            "(?i)",
            "*",
        ),
    ]
)
texts = st.one_of(st.text(max_size=40), st.lists(words, max_size=12).map("".join))


@given(entries, texts)
@example(ENTRIES["soap"], "adam_modules='a\\'")
@example(ENTRIES["soap"], "adam_modules='a'b'")
@example(ENTRIES["soap"], "adam_modules='a\0'")
@example(ENTRIES["soap"], "adam_modules='a'" + "+'a'" * 3000)
@example(ENTRIES["soap"], "adam_modules=a{99999999999}")
@example(ENTRIES["soap"], "adam_modules=" + "(" * 3000 + ")" * 3000)
@example(ENTRIES["soap"], "precondition_frequency=" + "9" * 5000)
@cases(2.0)
def test_any_optim_args_are_read_or_refused_in_words(entry: Any, text: str) -> None:
    """Some texts ended in a SyntaxError, an OverflowError or a RecursionError, with pages of what had come."""
    config, said = answer(lambda: parse_optim_args(text, entry.config))
    if config is None:
        assert re.search("got|wants|unknown option|is not an option|twice", said)
        assert len(said) < 1500
    else:
        assert parse_optim_args(config.to_optim_args(), entry.config) == config


def answer(make: Callable[[], Any]) -> tuple[Any, str]:
    """What is made, or None and what the ValueError says; other errors are none that a user should see."""
    try:
        return make(), ""
    except ValueError as error:
        return None, str(error) if type(error) is ValueError else f"a {type(error)}"


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.booleans(),
        st.integers(-3, 10**6),
        st.integers(10**4000, 10**4001),
        st.floats(),
        st.none(),
        st.text(max_size=8),
        st.sampled_from(
            ["rank", "both", "skip", "off", "local", "bfloat16", "ema", "sum", "adam", "newton", "attn|mlp"]
        ),
        st.dictionaries(
            st.one_of(st.text(max_size=8), st.sampled_from(["@head", "@vectors", r"h\.[01]", "a{1,2}", r"[\']"])),
            st.fixed_dictionaries(
                {},
                optional={
                    "rule": st.just("adam"),
                    "lr": st.floats(),
                    "weight_decay": st.integers(-1, 3),
                    "eps": st.floats(0, 1),
                    "stacked_matrices": st.booleans(),
                    "block_size": st.sampled_from([None, 4]),
                },
            ),
            max_size=3,
        ),
    )


@given(entries, st.data())
@cases(0.6)
def test_any_config_round_trips_through_text(entry: Any, data: st.DataObject) -> None:
    """What a config writes as optim_args reads as the same config, quotes, commas and backslashes included."""
    known = option_fields(entry.config)
    kept: dict[str, Any] = {}
    for key in data.draw(st.lists(st.sampled_from(sorted(known)), max_size=4, unique=True)):
        value = data.draw(values_of(known[key].type))
        config, said = answer(lambda key=key, value=value: entry.config(**{key: value}))
        if config is None:
            assert key in said
            assert len(said) < 400
        else:
            kept[key] = value
    config = entry.config(**kept)
    assert parse_optim_args(config.to_optim_args(), entry.config) == config
