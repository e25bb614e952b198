"""Shampoo's roots computed in the background: reproducible with a fixed delay, and never in the way."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import time
from typing import Any

import pytest
import torch
from problems import Problem
from torch import Tensor

from hf_soap import Shampoo
from hf_soap.engine.background import Background
from hf_soap.engine.failures import Failures
from hf_soap.linalg import inverse_roots

SETTINGS: dict[str, Any] = {"lr": 1e-2, "precondition_frequency": 6, "start_step": 2}
SHAPES = [(9, 9), (6, 8), (9, 9), (5,)]


def fresh() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(weight.float()) for weight in Problem(*SHAPES).weights]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int, *, skip: int = 0) -> None:
    """Steps ``skip``+1 to ``skip``+``steps`` on gradients that depend on the weights."""
    problem = Problem(*SHAPES)
    for step in range(skip + steps):
        grads = problem.gradients([p.detach().double() for p in params])
        if step < skip:
            continue
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.float()
        optimizer.step()


def values(params: list[torch.nn.Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def trained(steps: int = 30, **options: Any) -> list[Tensor]:
    params = fresh()
    train(Shampoo(params, **{**SETTINGS, **options}), params, steps)
    return values(params)


def hf_soap_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hf_soap")]


def assert_no_thread_is_left() -> None:
    deadline = time.monotonic() + 10
    while hf_soap_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not hf_soap_threads()


def test_no_delay_equals_roots_in_place() -> None:
    for got, wanted in zip(trained(asynchronous=True, delay=0), trained(), strict=True):
        assert torch.equal(got, wanted)


def test_roots_in_the_background_leave_no_room_for_growing_distances() -> None:
    with pytest.raises(ValueError, match=r"asynchronous=True got refresh_growth=0\.1, wanted 0"):
        Shampoo(fresh(), asynchronous=True, refresh_growth=0.1, **SETTINGS)


@pytest.mark.parametrize("delay", [1, 4, 6])
def test_a_fixed_delay_is_reproducible_and_uses_roots_exactly_that_much_later(
    delay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(asynchronous=True, delay=delay)
    inverse_root = inverse_roots.inverse_root

    def late(*args: Any, **kwargs: Any) -> Tensor:
        time.sleep(0.01)  # the step at which the roots are due must wait for them
        return inverse_root(*args, **kwargs)

    monkeypatch.setattr(inverse_roots, "inverse_root", late)
    for got, wanted in zip(trained(asynchronous=True, delay=delay), first, strict=True):
        assert torch.equal(got, wanted)

    params = fresh()
    optimizer = Shampoo(params, asynchronous=True, delay=delay, **SETTINGS)
    changed, last = [], None
    for step in range(1, 21):
        train(optimizer, params, 1, skip=step - 1)
        root = optimizer.state[params[0]]["root_0"].clone()
        if last is not None and not torch.equal(root, last):
            changed.append(step)
        last = root
    # In place at the start step, then a delay behind each multiple of the frequency.
    assert changed == [2, *[due + delay for due in (6, 12, 18) if due + delay <= 20]]


@pytest.mark.parametrize("saved_at", [7, 9, 12, 13])
@pytest.mark.parametrize("delay", [4, 6])
def test_a_resumed_run_is_bitwise_the_same_between_snapshot_and_swap(delay: int, saved_at: int) -> None:
    whole = trained(24, asynchronous=True, delay=delay)
    params = fresh()
    optimizer = Shampoo(params, asynchronous=True, delay=delay, **SETTINGS)
    train(optimizer, params, saved_at)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [torch.nn.Parameter(weight) for weight in values(params)]
    continued = Shampoo(resumed, asynchronous=True, delay=delay, **SETTINGS)
    continued.load_state_dict(torch.load(file, weights_only=True))
    train(continued, resumed, 24 - saved_at, skip=saved_at)
    for got, wanted in zip(values(resumed), whole, strict=True):
        assert torch.equal(got, wanted)


def test_copies_go_on_like_the_original_with_a_job_under_way() -> None:
    whole = trained(24, asynchronous=True, delay=4)
    params = fresh()
    optimizer = Shampoo(params, asynchronous=True, delay=4, **SETTINGS)
    train(optimizer, params, 7)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        own = copied.param_groups[0]["params"]
        train(copied, own, 17, skip=7)
        for got, wanted in zip(values(own), whole, strict=True):
            assert torch.equal(got, wanted)


def test_without_a_delay_roots_are_taken_when_done_and_age_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    inverse_root = inverse_roots.inverse_root

    def held(*args: Any, **kwargs: Any) -> Tensor:
        if threading.current_thread().name.startswith("hf_soap"):
            gate.wait(timeout=10)
        return inverse_root(*args, **kwargs)

    monkeypatch.setattr(inverse_roots, "inverse_root", held)
    params = fresh()
    optimizer = Shampoo(params, asynchronous=True, **SETTINGS)
    train(optimizer, params, 11)
    held_back = optimizer.state[params[0]]["root_0"].clone()
    threading.Timer(0.2, gate.set).start()
    started = time.monotonic()
    train(optimizer, params, 1, skip=11)  # the next roots are due: these must be taken first
    assert time.monotonic() - started > 0.1
    assert not torch.equal(optimizer.state[params[0]]["root_0"], held_back)
    assert_no_thread_is_left()


def test_failed_roots_leave_the_previous_ones_in_use(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    params = fresh()
    optimizer = Shampoo(params, asynchronous=True, delay=4, **SETTINGS)
    train(optimizer, params, 5)
    before = optimizer.state[params[0]]["root_0"].clone()

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(inverse_roots, "inverse_root", broken)
    train(optimizer, params, 7, skip=5)
    assert torch.equal(optimizer.state[params[0]]["root_0"], before)
    assert "did not converge" in caplog.text
    assert_no_thread_is_left()


def test_no_thread_outlives_its_work_or_an_exception() -> None:
    params = fresh()
    optimizer = Shampoo(params, asynchronous=True, **SETTINGS)
    train(optimizer, params, 7)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_no_thread_is_left()


def test_background_runs_jobs_in_order_and_forgets_what_was_taken() -> None:
    failures = Failures()
    background = Background(failures)
    for number in range(3):
        background.submit(number, lambda given: {"root": given["root"] + 1}, {"root": torch.tensor([float(number)])})
    for number in range(3):
        assert background.take(number, wait=True) == {"root": torch.tensor([number + 1.0])}
        assert background.take(number, wait=True) is None
    background.submit("bad", lambda given: {"root": given["no such"]}, {"root": torch.zeros(1)})
    assert background.take("bad", wait=True) is None
    assert failures.count() == 1
    assert_no_thread_is_left()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"asynchronous": True, "delay": 7}, "delay must be <= precondition_frequency=6, got 7"),
        ({"delay": 3}, "set asynchronous=True"),
        ({"kl": True}, "graft=None"),
        ({"root_method": "newton", "exponent": -0.4}, "root_method='eigh'"),
        ({"root_method": "newton", "root_cutoff": 0.1}, "root_method='eigh'"),
        ({"exponent": 0.5}, "exponent must be < 0, got 0.5"),
        ({"graft": "adamw"}, "graft must be adam or adagrad"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shampoo(fresh(), **{**SETTINGS, **options})
