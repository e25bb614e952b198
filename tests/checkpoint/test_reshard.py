"""State that was cut in one way and is loaded in another, in one process."""

import pytest
import torch
from helpers import fresh_state, gradient, parameters, through_a_file, train
from torch import Tensor
from torch.nn import Parameter

from hf_soap import MARS, SOAP, Shampoo
from hf_soap.checkpoint import reshard
from hf_soap.distributed.dtensor import Shard
from hf_soap.rules.base import Rule
from hf_soap.rules.context import StepContext
from hf_soap.rules.elementwise import AdamWRule
from hf_soap.rules.layout import Layout, plan_layout
from hf_soap.rules.soap import SoapRule

SOAP_RULE = SoapRule(beta1=0.9, beta2=0.9, shampoo_beta=0.9, eps=1e-8, precondition_frequency=2)


def whole(*shape: int) -> Shard:
    return Shard(shape, (0,) * len(shape), shape, shape)


def rows(shape: tuple[int, ...], first: int, last: int) -> Shard:
    """The part of a matrix that has these rows."""
    return Shard(shape, (first, 0), (last - first, *shape[1:]), (last - first, *shape[1:]))


def test_a_description_can_be_understood() -> None:
    shard, layout = rows((9, 6), 4, 8), Layout((4, 6), (2, 3), (2, 2), (0, 1))
    piece = reshard.understand(
        reshard.describe(shard, layout), {"factor_0": torch.ones(1, 2, 2), "factor_1": torch.ones(1, 2, 2)}, SOAP_RULE
    )
    assert (piece.shard, piece.layout) == (shard, layout)


def roles(rule: Rule, layout: Layout) -> dict[str, Tensor]:
    state = fresh_state(rule, layout, device="meta")
    return {**state, "step": torch.zeros(())}


def soap_state(grads: list[Tensor], layout: Layout) -> dict[str, Tensor]:
    """State of SOAP after one gradient that seeded it and more that it was updated with."""
    state = fresh_state(SOAP_RULE, layout)
    SOAP_RULE.seed(layout.to_blocks(grads[0]), state, StepContext(layout, (0,), (0,)))
    for t, grad in enumerate(grads[1:], start=1):
        SOAP_RULE.update(layout.to_blocks(grad), state, StepContext(layout, (t,), (0,)))
    return {**state, "step": torch.tensor(float(len(grads)))}


def test_a_shard_of_what_one_process_saved_gets_its_part_of_the_factors() -> None:
    """The left factor of some rows is a corner of the whole; the right factor sums over rows, and is shared out."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(5)]
    layout = plan_layout((6, 4), max_precond_dim=100)
    saved = soap_state(grads, layout)
    part, shard = plan_layout((2, 4), max_precond_dim=100), rows((6, 4), 2, 4)
    wanted = roles(SOAP_RULE, part)
    state = reshard.reshard([reshard.Piece(whole(6, 4), layout, saved)], SOAP_RULE, part, shard, wanted)

    old, new = SOAP_RULE.restate(saved, layout), SOAP_RULE.restate(state, part)
    torch.testing.assert_close(new["factor_0"], old["factor_0"][:, 2:4, 2:4])
    torch.testing.assert_close(new["factor_1"], old["factor_1"] / 3)
    torch.testing.assert_close(new["exp_avg"], old["exp_avg"][:, 2:4])
    assert state["step"] == 5
    torch.testing.assert_close(state["exp_avg_sq"].mean(), saved["exp_avg_sq"].mean())
    for side in (0, 1):
        basis, factor = state[f"basis_{side}"], state[f"factor_{side}"]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[-1], dtype=torch.float64).unsqueeze(0))
        torch.testing.assert_close(factor, torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1)))


def test_shards_put_together_have_the_sum_of_their_right_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(5)]
    part, layout = plan_layout((3, 4), max_precond_dim=100), plan_layout((6, 4), max_precond_dim=100)
    pieces = [
        reshard.Piece(rows((6, 4), first, first + 3), part, soap_state([g[first : first + 3] for g in grads], part))
        for first in (0, 3)
    ]
    wanted = {
        **fresh_state(SOAP_RULE, layout, device="meta"),
        "step": torch.zeros(()),
    }
    state = reshard.reshard(pieces, SOAP_RULE, layout, whole(6, 4), wanted)
    new, direct = SOAP_RULE.restate(state, layout), SOAP_RULE.restate(soap_state(grads, layout), layout)
    torch.testing.assert_close(new["factor_1"], direct["factor_1"])
    torch.testing.assert_close(new["exp_avg"], direct["exp_avg"])
    torch.testing.assert_close(new["factor_0"][:, :3, :3], direct["factor_0"][:, :3, :3])
    assert not new["factor_0"][:, :3, 3:].abs().max() > 1e-12, "no old part saw how the halves correlate"


def test_what_has_no_factors_carries_over_exactly() -> None:
    rule, layout = AdamWRule(beta1=0.9, beta2=0.9, eps=1e-8), plan_layout((6, 4), max_precond_dim=0)
    values = torch.arange(24.0).view(1, 6, 4)
    saved = {"exp_avg": values, "exp_avg_sq": values + 1, "step": torch.tensor(7.0)}
    part = plan_layout((2, 4), max_precond_dim=0)
    wanted = roles(rule, part)
    state = reshard.reshard([reshard.Piece(whole(6, 4), layout, saved)], rule, part, rows((6, 4), 4, 6), wanted)
    assert torch.equal(state["exp_avg"], values[:, 4:])
    assert torch.equal(state["exp_avg_sq"], values[:, 4:] + 1)
    assert state["step"] == 7


@pytest.mark.parametrize(
    ("make", "before", "after"),
    [
        (SOAP, {}, {"block_size": 4}),
        (SOAP, {"block_size": 4}, {"block_size": 3}),
        (SOAP, {"block_size": 3}, {}),
        (SOAP, {"factorized": True}, {"factorized": True, "block_size": 4}),
        (SOAP, {"kl": True}, {"kl": True, "block_size": 4}),
        (Shampoo, {"start_step": 1}, {"start_step": 1, "block_size": 4}),
        (MARS, {"variant": "soap"}, {"variant": "soap", "block_size": 3}),
    ],
    ids=str,
)
def test_a_run_goes_on_with_other_blocks(
    make: type[SOAP], before: dict[str, object], after: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """A change of block_size made a checkpoint unusable; now the next steps stay close to those without it."""
    settings = {"lr": 1e-2, "precondition_frequency": 2}
    # In float32, rounding of the first steps decides where factors that are not of full rank yet point.
    params = parameters([(6, 6), (4, 9), (5,)], dtype=torch.float64)
    optimizer = make(params, **settings, **before)
    train(optimizer, params, range(20))
    again = [Parameter(param.detach().clone()) for param in params]
    other = make(again, **settings, **after)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert sum("saved in other parts" in text for text in caplog.messages) == 1
    start = [param.detach().clone() for param in params]
    for step in range(20, 24):
        for place, (param, twin) in enumerate(zip(params, again, strict=True)):
            param.grad = gradient(param, place, step)
            twin.grad = param.grad.clone()
        optimizer.step()
        other.step()
    for param, twin, origin in zip(params, again, start, strict=True):
        moved, apart = (param - origin).norm(), (param - twin).norm()
        assert twin.isfinite().all()
        assert apart < 0.8 * moved, "an update in another direction altogether"
        cosine = torch.nn.functional.cosine_similarity((param - origin).flatten(), (twin - origin).flatten(), dim=0)
        assert cosine > 0.7


def test_a_factor_of_a_shard_stays_in_proportion() -> None:
    """At 64 ranks each would carry a whole 4096 x 4096 factor for 64 rows."""
    layout = plan_layout((4096, 4096), max_precond_dim=10000, part=(64, 4096))
    assert layout == Layout((64, 4096), (1, 16), (64, 256), (0, 1))
    assert layout.factor_numel() <= 5 * 64 * 4096
    assert plan_layout((64, 4096), max_precond_dim=10000).factor_numel() > 60 * 64 * 4096
    assert plan_layout((1536, 3072), max_precond_dim=10000, part=(768, 3072)).blocks == 1, (
        "an MLP of GPT-2 stays whole"
    )
    assert plan_layout((64, 4096), max_precond_dim=10000, part=(1, 4096)).sides == (), "too thin for factors of a use"
