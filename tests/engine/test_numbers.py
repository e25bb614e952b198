"""Numbers that go wrong: no gradient and no decomposition may poison what was learned before."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from family import TABLE, Row, rows, trained
from helpers import assert_same, gradient, parameters, snapshot, train
from torch import Tensor
from torch.nn import Parameter

from hf_soap import MARS, SOAP, Shampoo
from hf_soap.trainer.metrics import diagnostics


def bad_step(optimizer: Any, params: list[Parameter], spoil: Callable[[Tensor], Any]) -> None:
    for place, param in enumerate(params):
        param.grad = gradient(param, place, 4)
    spoil(params[1].grad)  # type: ignore[arg-type]
    optimizer.step()


# Steps that are skipped


@rows
@pytest.mark.parametrize("bad", [lambda grad: grad[0, 1].fill_(torch.nan), lambda grad: grad.fill_(-torch.inf)])
def test_an_endless_streak_of_bad_gradients_is_an_error(row: Row, bad: Any) -> None:
    """A run whose every gradient was NaN went on to its end, with one warning at its start and nothing learned."""
    params, optimizer = trained(row, steps=4, max_skipped_in_a_row=10)
    before = snapshot(optimizer, params)
    for _ in range(9):
        bad_step(optimizer, params, bad)
    assert optimizer.skipped_steps == 9
    train(optimizer, params, range(4, 5))  # a good one starts the count anew
    for _ in range(9):
        bad_step(optimizer, params, bad)
    with pytest.raises(FloatingPointError, match=r"1\d steps in a row .*max_skipped_in_a_row=0") as caught:
        bad_step(optimizer, params, bad)
    assert "parameter 1 of group 0, of shape (4, 9)" in str(caught.value)
    again, other = trained(row, steps=4)
    assert_same(snapshot(other, again)[0], before[0])
    train(optimizer, params, range(5, 8))  # whoever catches the error may go on
    train(other, again, range(4, 8))
    for got, want in zip(params, again, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_no_limit_skips_without_end() -> None:
    params, optimizer = trained(SOAP, steps=2, max_skipped_in_a_row=0)
    for _ in range(150):
        bad_step(optimizer, params, lambda grad: grad.fill_(torch.nan))
    assert optimizer.skipped_steps == 150


def test_the_count_starts_anew_with_a_load_and_a_copy() -> None:
    _, optimizer = trained(SOAP, steps=2, max_skipped_in_a_row=3)
    for other in (optimizer, copy.deepcopy(optimizer)):
        own = other.param_groups[0]["params"]
        for _ in range(2):
            bad_step(other, own, lambda grad: grad.fill_(torch.nan))
        other.load_state_dict(other.state_dict())
        bad_step(other, own, lambda grad: grad.fill_(torch.nan))
        assert other.skipped_steps == 1


def test_the_error_names_a_named_parameter() -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = SOAP(model.named_parameters(), max_skipped_in_a_row=1)
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.nan)
    with pytest.raises(FloatingPointError, match="now in weight, of shape"):
        optimizer.step()


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_up_together(count: int, tmp_path: Path) -> None:
    names = ["soap"] if count == 2 else ["soap", "shampoo", "mars"]
    ranks.run("sharded_numbers.a_streak_on_one_rank_is_an_error_on_all", count, tmp_path, names=names)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_failure_on_one_rank_holds_up_nobody(count: int, tmp_path: Path) -> None:
    names = ["soap", "shampoo"] if count == 2 else ["soap", "kl_soap", "shampoo", "shampoo, late roots", "mars_soap"]
    ranks.run("sharded_numbers.a_decomposition_that_fails_on_one_rank", count, tmp_path, names=names)


def test_a_refused_step_counts_on_no_rank(tmp_path: Path) -> None:
    ranks.run("sharded_numbers.a_refused_step_counts_nowhere", 2, tmp_path)


# Gradients of any size

SIZES = [(6, 6), (4, 9), (5,), (4, 4, 4)]

UNGRAFTED = ("original",)
"""Their step is as long as the gradient is larger than those that the roots were made of, by definition."""


def descend(row: Row, size: Callable[[int], float], steps: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Goes down a quadratic valley with noise, with gradients multiplied by ``size(step)``."""
    params = parameters(SIZES, dtype)
    optimizer = row(params, lr=0.01, weight_decay=0.0)
    losses, longest = [], 0.0
    for step in range(steps):
        losses.append(sum(float(param.detach().double().square().sum()) for param in params))
        before = [param.detach().clone() for param in params]
        for place, param in enumerate(params):
            noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * place + step))
            param.grad = ((param.detach() + 0.1 * noise) * size(step)).to(dtype)
        optimizer.step()
        moved = [(param.detach() - old).abs().max().item() for param, old in zip(params, before, strict=True)]
        longest = max(longest, max(moved) / 0.01)
    state = [value for entry in optimizer.state.values() for value in entry.values() if value.is_floating_point()]
    finite = all(tensor.isfinite().all() for tensor in (*params, *state))
    return {"losses": losses, "longest": longest, "finite": finite, "optimizer": optimizer}


family = pytest.mark.parametrize(
    "name", [n if not row.slow else pytest.param(n, marks=pytest.mark.slow) for n, row in TABLE.items()]
)


@family
def test_a_spike_is_forgotten(name: str) -> None:
    """Bound: a thousandfold gradient moves no weight by a hundred learning rates, and the loss falls again."""
    run = descend(TABLE[name], lambda step: 1000.0 if step == 20 else 1.0, 60)
    assert run["finite"]
    if name not in UNGRAFTED:
        assert run["longest"] < 100
        # The second moment remembers the spike for ln(1e6)/(1 - beta) steps; momentum turns within 20.
        assert run["losses"][-1] < run["losses"][40]


@family
@pytest.mark.parametrize("small", [1e-30, 1e-22, 1e-12])
def test_gradients_may_vanish_and_come_back(name: str, small: float) -> None:
    """Squares of 1e-30 are zero in float32: KL factors of nothing stayed zero for ever, or became infinite."""
    run = descend(TABLE[name], lambda step: small if step < 15 else 1.0, 50)
    assert run["finite"]
    if name not in UNGRAFTED:
        assert run["losses"][-1] < run["losses"][15]  # what adapts descends on vanishing gradients too
        assert run["longest"] < 100


@pytest.mark.parametrize("name", ["soap", "kl-soap", "shampoo", "kl-shampoo", "padded blocks"])
def test_a_leap_by_forty_orders_of_magnitude_is_finite(name: str) -> None:
    """Whitened by eigenvalues of 1e-38, the squares of gradients of 1e10 were infinite, and KL-SOAP's factors NaN."""
    assert descend(TABLE[name], lambda step: 1e-30 if step < 10 else 1e10, 20)["finite"]


@family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_too_large_to_square_are_skipped_and_large_ones_are_used(name: str, dtype: torch.dtype) -> None:
    run = descend(TABLE[name], lambda step: 1e30 if step % 3 == 1 else 1e15, 15, dtype)
    assert run["finite"]
    assert run["optimizer"].skipped_steps == 5


@family
def test_a_hundred_zero_gradients_are_survived(name: str) -> None:
    run = descend(TABLE[name], lambda step: 0.0 if 8 <= step < 108 else 1.0, 150)
    assert run["finite"]
    assert run["losses"][-1] < run["losses"][108]
    if name not in UNGRAFTED:
        assert run["longest"] < 100


@family
def test_gradients_of_rank_one_and_now_and_then(name: str) -> None:
    """A parameter that has a gradient in every seventh step, and one whose gradients all have the same direction."""
    params = parameters([(6, 6), (6, 6), (5,)])
    optimizer, start = TABLE[name](params, lr=0.01), [param.detach().clone() for param in parameters([(6, 6)] * 2)]
    left, right = torch.randn(6, 1), torch.randn(1, 6)
    for step in range(50):
        for place, param in enumerate(params):
            param.grad = gradient(param, place, step)
        params[0].grad = (1 + 0.1 * math.sin(step)) * left @ right
        if step % 7:
            params[1].grad = None
        optimizer.step()
    for param, before in zip(params, start, strict=False):
        assert param.isfinite().all()
        assert 0 < (param - before).abs().max() < 50 * 0.01 * 100


def test_kl_shampoo_does_not_leap_at_its_start() -> None:
    """Factors of one gradient are singular: a tiny GPT-2 had weights of 1e8 behind the third step."""
    for shape in ((12, 40), (40, 12), (16, 16)):
        torch.manual_seed(0)
        param = Parameter(torch.zeros(shape))
        optimizer = Shampoo([param], lr=1.0, kl=True, graft=None, weight_decay=0.0)
        for _ in range(12):
            before = param.detach().clone()
            param.grad = 1e-3 * torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
            optimizer.step()
            assert (param - before).square().mean().sqrt() <= (0.95 * 0.05) ** -0.5


def moves_of_kl_shampoo(shape: tuple[int, ...], scales: list[float], **settings: Any) -> list[float]:
    """Root mean square of each step at a learning rate of 1, of gradients of these sizes."""
    torch.manual_seed(0)
    param, moves = Parameter(torch.zeros(shape)), []
    optimizer = Shampoo([param], lr=1.0, betas=(0.0, 0.95), kl=True, graft=None, weight_decay=0.0, **settings)
    for scale in scales:
        before, param.grad = param.detach().clone(), scale * torch.randn(shape)
        optimizer.step()
        moves.append(float((param.detach() - before).square().mean().sqrt()))
    return moves


@pytest.mark.parametrize(("shape", "one_sided"), [((32, 64), False), ((32, 64), True), ((8, 8, 8), False)])
def test_kl_shampoo_moves_as_far_whatever_the_size_of_gradients(shape: tuple[int, ...], one_sided: bool) -> None:
    """With one factor ε stopped what gradients below 1e-4 would do: a factor is their square there."""
    moves = [moves_of_kl_shampoo(shape, [scale] * 5, one_sided=one_sided)[-1] for scale in (1e-3, 1e-6, 1e-7)]
    assert moves[1] == pytest.approx(moves[0], rel=0.1)
    assert moves[2] > 0.5 * moves[0]


@pytest.mark.parametrize("first", [1e-6, 1e-4])
def test_kl_shampoo_recovers_from_a_tiny_first_gradient(first: float) -> None:
    """Both factors overshot by the square of the change while they whitened each other by stale roots."""
    usual = moves_of_kl_shampoo((32, 64), [1e-3] * 21)
    moves = moves_of_kl_shampoo((32, 64), [first] + [1e-3] * 20)
    assert all(0.5 * u < m < 2 * u for u, m in zip(usual[5:], moves[5:], strict=True))


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_a_block_without_a_first_gradient_is_trained_later(eps: float) -> None:
    """Rows of an embedding that the first batch did not touch had factors of zero for good."""
    param = Parameter(torch.ones(8, 4))
    optimizer = Shampoo([param], lr=1e-3, eps=eps, kl=True, graft=None, block_size=4, weight_decay=0.0)
    for step in range(30):
        param.grad = torch.randn(8, 4) if step else 1e-25 * torch.randn(8, 4)
        if not step:
            param.grad[4:] = 0
        optimizer.step()
    assert ((param - 1).view(2, 16).square().mean(1).sqrt() > 1e-3).all()


# Decompositions that fail

FAILING = {"eigh": torch.linalg.eigh, "qr": torch.linalg.qr}


def failing(monkeypatch: pytest.MonkeyPatch, how: str, bad: Callable[[Tensor], Tensor]) -> None:
    """Has decompositions of the matrices that ``bad`` says (a bool each) raise for the batch, or give NaN."""

    def broken(name: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def solve(matrix: Tensor) -> tuple[Tensor, Tensor]:
            which = bad(matrix)
            if how == "raises" and which.any():
                raise torch.linalg.LinAlgError(f"{name} did not converge")
            one, other = FAILING[name](matrix)
            one, other = one.clone(), other.clone()
            one[which], other[which] = torch.nan, torch.nan
            return one, other

        return solve

    for name in FAILING:
        monkeypatch.setattr(torch.linalg, name, broken(name))


def every(matrix: Tensor) -> Tensor:
    return torch.ones(matrix.shape[:-2], dtype=torch.bool)


@rows
@pytest.mark.parametrize("how", ["raises", "gives NaN"])
@pytest.mark.parametrize("when", [0, 4])
def test_training_goes_on_without_decompositions(
    row: Row, how: str, when: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the first step on with the identity, later with the bases and roots that are there."""
    params, optimizer = trained(row, steps=when)
    kept = {id(p): {k: v.clone() for k, v in optimizer.state[p].items() if k[:4] in ("basi", "root")} for p in params}
    failing(monkeypatch, how, every)
    train(optimizer, params, range(when, 12))
    newton = any(group.get("root_method") == "newton" for group in optimizer.param_groups)  # products alone
    plans = [optimizer.plan_of(member.settings, member.param) for member in optimizer.members()]
    factored = not newton and any(spec.kind == "factor" for plan in plans for spec in plan.state_spec.values())
    assert (optimizer.failed_refreshes > 0) == factored
    assert diagnostics(optimizer)["optimizer/failed_refreshes"] == optimizer.failed_refreshes
    for place, (param, start) in enumerate(zip(params, parameters(), strict=True)):
        assert param.isfinite().all(), place
        assert not param.numel() or not torch.equal(param, start), place
        for role, value in optimizer.state[param].items():
            assert value.isfinite().all(), role
            late = any(group.get("asynchronous") for group in optimizer.param_groups)  # sound ones were under way
            if role.startswith(("basis", "root")) and value.any() and not (newton or late):
                eye = torch.eye(value.shape[-1]).expand_as(value)
                before = kept[id(param)].get(role, eye)
                torch.testing.assert_close(value, before if before.any() else eye, rtol=1e-5, atol=1e-5)
    said = [text for text in caplog.messages if "decompositions of factors have failed" in text]
    assert len(said) <= 3  # the first, and each time that there are ten times as many
    monkeypatch.undo()
    train(optimizer, params, range(12, 15))  # what the background had under way
    failures = optimizer.failed_refreshes
    train(optimizer, params, range(15, 18))
    assert optimizer.failed_refreshes == failures
    assert all(param.isfinite().all() for param in params)


class FirstOfTwo:
    """Says of the first of two matrices that it is bad, and again when it is tried by itself, or nearly it."""

    def __init__(self) -> None:
        self.known: list[Tensor] = []

    def __call__(self, matrix: Tensor) -> Tensor:
        if matrix.dim() == 3 and len(matrix) == 2:
            self.known.append(matrix[0].double())
            return torch.tensor([True, False])
        alone = matrix.double().flatten()
        again = any(
            torch.allclose(alone / alone.norm(), known / known.norm(), rtol=0, atol=1e-6)
            for known in map(Tensor.flatten, self.known)
            if known.numel() == alone.numel()
        )
        return torch.full(matrix.shape[:-2], again)


@pytest.mark.parametrize("how", ["raises", "gives NaN"])
@pytest.mark.parametrize("name", ["soap", "kl-soap", "one-sided", "shampoo", "kl-shampoo"])
def test_one_bad_factor_does_not_stop_the_others(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors in one bucket, the first keeps its basis or root, the second has the very bits that it has alone."""
    runs = []
    for broken in (False, True):
        params, optimizer = trained(TABLE[name], steps=4, shapes=[(6, 8), (6, 8)])
        first = {role: value.clone() for role, value in optimizer.state[params[0]].items()}
        if broken:
            failing(monkeypatch, how, FirstOfTwo())
        train(optimizer, params, range(4, 8))
        runs.append((params, optimizer))
    (fine, whole), (params, optimizer) = runs
    sides = sum(role.startswith("factor_") for role in first)
    assert optimizer.failed_refreshes == sides
    assert_same(params[1].detach(), fine[1].detach())
    assert_same(dict(optimizer.state[params[1]]), dict(whole.state[fine[1]]))
    for role, value in optimizer.state[params[0]].items():
        if role.startswith(("basis", "root")):
            assert torch.equal(value, first[role]), role
            assert not torch.equal(value, whole.state[fine[0]][role]), role


def test_failures_are_counted_where_the_host_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    params, optimizer = trained(TABLE["soap"], steps=4)
    failing(monkeypatch, "gives NaN", every)
    monkeypatch.setattr("hf_soap.engine.failures.SYNCHRONOUS", set())
    train(optimizer, params, range(4, 8))
    assert not caplog.messages
    assert optimizer.failed_refreshes > 0
    assert "decompositions of factors have failed" in caplog.text
    assert all(param.isfinite().all() for param in params)


# float16


@pytest.mark.parametrize("make", [SOAP, Shampoo, MARS])
def test_steps_that_a_scaler_skips_leave_no_trace(make: Any) -> None:
    """The scaler looks for infinities itself, and does not call the optimizer when it finds one."""
    param = Parameter(torch.ones(4, 4))
    optimizer, scaler = make([param], lr=0.01), torch.amp.GradScaler("cpu", init_scale=2.0**30)
    skipped = 0
    for _ in range(60):
        before, scale = snapshot(optimizer, [param]), scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = (param @ torch.ones(4, 4)).square().mean()
        scaler.scale(loss).backward()
        if scale > 2.0**10:
            param.grad.fill_(torch.inf)  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            assert_same(snapshot(optimizer, [param]), before)
    assert 15 <= skipped <= 25
    assert optimizer.skipped_steps == 0
    assert param.isfinite().all()
    assert (param < 1).all()


@rows
def test_float16_parameters(row: Row) -> None:
    params = parameters(dtype=torch.float16)
    optimizer = row(params)
    train(optimizer, params, range(12))
    assert all(param.isfinite().all() for param in params)
    assert {value.dtype for entry in optimizer.state.values() for value in entry.values()} <= {
        torch.float32,
        torch.float64,
    }
