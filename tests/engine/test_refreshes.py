"""Refreshes that come behind the step, beside the next forward pass, and what neither they nor a step wait for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from devices import HostWaits, out_of_memory
from helpers import FULL_RANK, assert_same, gradient, parameters, snapshot, train
from torch.nn import Parameter

from hf_soap import MARS, SOAP
from hf_soap.engine.failures import Failures
from hf_soap.rules.context import StepContext

FREQUENCY = 4
soap = partial(SOAP, precondition_frequency=FREQUENCY, refresh_growth=0.0)
OVERLAPPING = {
    "soap": soap,
    "staggered": partial(soap, stagger=True),
    "one-sided": partial(soap, one_sided=True, factorized=True),
    "kl": partial(soap, kl=True),
    "current": partial(soap, include_current=True),
    "rounded": partial(soap, state_dtype="bfloat16", pack_factors=True),
    "mars-soap": partial(MARS, variant="soap", precondition_frequency=FREQUENCY),
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in OVERLAPPING.items()])
def test_a_refresh_behind_the_step_is_the_same_refresh(make: Callable[..., Any]) -> None:
    runs = []
    for overlap in (False, True):
        params = parameters()
        optimizer = make(params, overlap_refresh=overlap)
        for step in range(14):
            for place, param in enumerate(params):
                param.grad = gradient(param, place, step)
            if step in (3, 4, 8):
                params[0].grad[0, 0] = torch.inf  # type: ignore[index]
            optimizer.step()
        runs.append(snapshot(optimizer, params))
    for own in (saved for _, saved in runs):
        del own["param_groups"]
    assert_same(*runs)


def test_a_refresh_that_fails_behind_the_step_starts_its_tensors_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(FULL_RANK)
    optimizer = soap(params, overlap_refresh=True)
    train(optimizer, params, range(FREQUENCY))
    with monkeypatch.context() as patch:
        patch.setattr("hf_soap.linalg.eigenbases.sorted_refresh", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            train(optimizer, params, [FREQUENCY])
    counts = [int(optimizer.state[param]["step"]) for param in params]
    assert counts.count(0) > 0
    assert set(counts) <= {0, FREQUENCY + 1}
    train(optimizer, params, range(FREQUENCY + 1, 3 * FREQUENCY))
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("read", ["state_dict", "failed_refreshes", "__getstate__", "consolidate"])
def test_state_is_read_behind_refreshes(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(FULL_RANK)
    optimizer = soap(params, overlap_refresh=True)
    train(optimizer, params, range(2))
    joined = []
    monkeypatch.setattr(optimizer._engine.refreshes, "join", lambda: joined.append(read))
    monkeypatch.setattr(optimizer, "spreads_state", lambda: False)
    value = getattr(optimizer, read)
    if callable(value):
        value()
    assert joined


@pytest.mark.parametrize("options", [{}, {"kl": True}, {"one_sided": True, "factorized": True}, {"stagger": True}])
def test_no_step_waits_for_the_device(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the finite check, which is off here."""
    monkeypatch.setattr("hf_soap.engine.failures.SYNCHRONOUS", set())
    params = parameters(FULL_RANK)
    optimizer = soap(params, nonfinite="off", **options)
    train(optimizer, params, range(2))
    for step in range(2, 10):
        for place, param in enumerate(params):
            param.grad = gradient(param, place, step)
        with HostWaits():
            optimizer.step()


WITHOUT_HOST = {
    **OVERLAPPING,
    "normalized": partial(soap, normalize_grads=True),
    "blocks": partial(soap, block_size=4),
    "mars": MARS,
    "mars-lion": partial(MARS, variant="lion"),
    "mars-shampoo": partial(MARS, variant="shampoo"),
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in WITHOUT_HOST.items()])
@pytest.mark.parametrize("by_products", [False, True])
def test_a_rule_neither_reads_from_its_device_nor_mixes_it_with_the_host(
    make: Callable[..., Any], by_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without numbers play a GPU's: what would wait for one, or mix it with the host's, raises."""
    monkeypatch.setattr("hf_soap.linalg.eigenbases._solves_by_products", lambda factor: by_products)
    optimizer, device = make(params := parameters(FULL_RANK)), torch.device("meta")
    group = optimizer.param_groups[0]
    for plan in {optimizer.plan_of(group, param) for param in params}:
        state = plan.computed(2, dtype=torch.float32, device=device)
        grad = torch.zeros(2 * plan.layout.blocks, *plan.layout.block, device=device)
        context = StepContext(plan.layout, (8, 8), (0, 0), failures=Failures(), later=True)
        if plan.traits.first_grad_seeds:
            plan.rule.seed(grad, state, context)
        assert plan.rule.update(grad, state, context).device == device
        if plan.traits.refreshes_last:
            plan.rule.refresh(state, context)


@pytest.mark.cuda
def test_refreshes_on_a_stream_of_their_own_are_the_same() -> None:
    def run(*, overlap: bool) -> Any:
        params = [Parameter(param.detach().cuda()) for param in parameters([(256, 384), (64, 48), (48,)])]
        optimizer = soap(params, overlap_refresh=overlap)
        for step in range(20):
            for place, param in enumerate(params):
                param.grad = gradient(param.cpu(), place, step).cuda()
            optimizer.step()
        weights, saved = snapshot(optimizer, params)
        return weights, saved["state"]

    assert_same(run(overlap=True), run(overlap=False))
