"""Cautious weight decay, and steps in proportion to the norm of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import Row, rows
from helpers import assert_same, gradient, parameters, through_a_file, train
from torch import Tensor, nn
from torch.nn import Parameter

from hf_soap import SOAP, Muon, SoapConfig
from hf_soap.optimizers.grouping import with_overrides
from hf_soap.reference import weight_steps
from hf_soap.rules.layout import is_stack

SHAPES = [(6, 6), (4, 9), (5,), (3, 4, 5), (4, 4, 4), (), (0, 3), (6, 6)]
"""Among them a stack of matrices, and a convolution."""

STEPS: dict[str, dict[str, Any]] = {
    "cautious": {"cautious_weight_decay": True},
    "relative": {"norm": "relative"},
    "relative, cautious": {"norm": "relative", "cautious_weight_decay": True},
    "hyperball": {"norm": "hyperball"},
}


def expected(weight: Tensor, direction: Tensor, options: dict[str, Any], **rates: Any) -> Tensor:
    """The textbook's step: of each matrix of a stack alone, and an ordinary one for vectors."""
    cautious, norm = options.get("cautious_weight_decay", False), options.get("norm")
    norm = norm if weight.dim() > 1 else None
    if norm is not None and is_stack(weight.shape):
        pairs = zip(weight, direction, strict=True)
        return torch.stack([weight_steps.step(*pair, cautious=cautious, norm=norm, **rates) for pair in pairs])
    return weight_steps.step(weight, direction, cautious=cautious, norm=norm, **rates)


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
@rows
def test_steps_equal_the_textbook(row: Row, options: dict[str, Any]) -> None:
    """A twin with the same gradients and state says what the directions are."""
    lr, weight_decay = 0.05, 0.5
    rates = {"lr": lr, "weight_decay": weight_decay}
    params, others = (parameters(SHAPES, torch.float64) for _ in range(2))
    optimizer, twin = row(params, **rates, **options), row(others, lr=1.0, weight_decay=0.0)
    for group in optimizer.param_groups + twin.param_groups:
        if "lr_1d" in group:
            group["lr_1d"] = group["weight_decay_1d"] = None
    for step in range(8):
        before = [param.detach().clone() for param in params]
        for place, (param, other) in enumerate(zip(params, others, strict=True)):
            other.data.copy_(param.data)
            param.grad = gradient(param, place, step)
            other.grad = param.grad.clone()
        optimizer.step()
        twin.step()
        for member, old, other in zip(optimizer.members(), before, others, strict=True):
            param, direction = member.param, old - other.detach()
            plan = optimizer.plan_of(member.settings, param)
            if not param.numel() or not direction.any():
                assert torch.equal(param, old)
                continue
            want = expected(old, direction, options, decay_last=plan.weight_step.decay_last, **rates)
            torch.testing.assert_close(param.detach(), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@rows
def test_runs_resume_bit_for_bit(row: Row, dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = parameters(SHAPES, dtype)
    optimizer = row(params, weight_decay=0.1, **options)
    train(optimizer, params, range(5))
    others = [Parameter(param.detach().clone()) for param in params]
    resumed = row(others, weight_decay=0.1, **options)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, params, range(5, 10))
    train(resumed, others, range(5, 10))
    assert_same([p.detach() for p in others], [p.detach() for p in params])
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("make", [SOAP, Muon])
def test_the_norm_stays_what_it_was(make: Any, dtype: torch.dtype, tolerance: float) -> None:
    """Of each matrix of a stack too, over 200 steps."""
    params = parameters([(6, 6), (3, 4, 5), (4, 4, 3, 3)], dtype)

    def norms() -> Tensor:
        whole = [params[0], *params[1], params[2]]
        return torch.stack([matrix.detach().double().norm() for matrix in whole])

    before, start = norms(), params[0].detach().clone()
    train(make(params, lr=0.02, weight_decay=0.1, norm="hyperball"), params, range(200))
    torch.testing.assert_close(norms(), before, rtol=tolerance, atol=0)
    assert (params[0] - start).norm() > 0.5 * start.norm()


@pytest.mark.parametrize("norm", ["relative", "hyperball"])
def test_a_step_is_as_long_at_any_width(norm: str) -> None:
    """Relative to the weights: lr, for directions that have next to nothing along them."""
    for width in (64, 256):
        generator = torch.Generator().manual_seed(1)
        param = Parameter(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))
        optimizer = Muon([param], lr=0.018, norm=norm)
        for _ in range(3):
            before = param.detach().clone()
            param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
            moved = (param.detach() - before).norm() / before.norm()
            assert moved.item() == pytest.approx(0.018, rel=0.02)


@pytest.mark.parametrize("lr", [torch.tensor(0.05, dtype=torch.float64), torch.tensor([0.05], dtype=torch.float64)])
@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_learning_rates_may_be_tensors(options: dict[str, Any], lr: Tensor) -> None:
    results = []
    for rate in (0.05, lr):
        params = parameters(SHAPES, torch.float64)
        train(SOAP(params, lr=rate, weight_decay=0.5, **options), params, range(6))
        results.append(params)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-12, atol=1e-12)


def test_weights_of_zero_are_refused_before_anything_has_changed() -> None:
    params = [Parameter(torch.ones(4, 4)), Parameter(torch.zeros(4, 6))]
    optimizer = SOAP([("first", params[0]), ("second", params[1])], norm="hyperball")
    params[0].grad = torch.ones(4, 4)
    optimizer.step()
    before = optimizer.state_dict()
    params[1].grad = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"got only zeros in second of shape \(4, 6\), wanted weights that are"):
        optimizer.step()
    assert_same(optimizer.state_dict(), before)
    optimizer.param_groups[0]["overrides"] = [{}, {"norm": None}]
    for _ in range(3):
        optimizer.step()
    assert params[1].any()


def test_a_matrix_of_zeros_in_a_stack_is_refused() -> None:
    param = Parameter(torch.ones(3, 4, 5))
    param.data[1] = 0
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="a matrix of zeros in parameter 0"):
        Muon([param], norm="relative").step()


class Model(nn.Module):
    """An embedding, a hidden matrix, a matrix of an adapter, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.lora_A = nn.Linear(6, 2, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def norms_of(config: SoapConfig) -> dict[str, str | None]:
    """Which norm the step of each parameter has."""
    model = Model()
    optimizer = SOAP(with_overrides(list(model.parameters()), model, config), norm=config.norm)
    return {m.name: optimizer.plan_of(m.settings, m.param).weight_step.norm for m in optimizer.members()}


def test_hidden_matrices_alone_are_constrained() -> None:
    others = ("embed.weight", "hidden.bias", "head.weight", "lora_A.weight")
    want = {"hidden.weight": "hyperball", **dict.fromkeys(others)}
    assert norms_of(SoapConfig(norm="hyperball")) == want
    own = {"embed": {"rule": "adam"}, "@head": {"norm": "relative"}}
    assert norms_of(SoapConfig(norm="hyperball", modules=own)) == {**want, "head.weight": "relative"}
    by_module = SoapConfig(modules={"hidden": {"norm": "relative"}})
    assert norms_of(by_module) == {**want, "hidden.weight": "relative"}
