"""What a step needs beside the state stays within the byte budget, whatever the number of tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from hf_soap import MARS, SOAP, Shampoo, SoapMuon
from hf_soap.engine.buckets import CHUNK_BYTES, temporary_bytes


def peak(call: Callable[[], Any]) -> int:
    """Bytes of tensors that were alive at once of those that a call made."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        highest = max(highest, alive)
    return highest


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "soap": SOAP,
    "soap, bf16 state": lambda params, **kw: SOAP(params, state_dtype="bfloat16", pack_factors=True, **kw),
    "soap, bf16 rotations": lambda params, **kw: SOAP(params, matmul_dtype="bfloat16", **kw),
    "soap, rotated second moment": lambda params, **kw: SOAP(params, rotate_second_moment=True, **kw),
    "soap_muon": SoapMuon,
    "kl_soap": lambda params, **kw: SOAP(params, kl=True, **kw),
    "factorized": lambda params, **kw: SOAP(params, one_sided=True, factorized=True, **kw),
    "shampoo": lambda params, **kw: Shampoo(params, start_step=1, **kw),
    "mars": lambda params, precondition_frequency: MARS(params),
    "mars_lion": lambda params, precondition_frequency: MARS(params, variant="lion"),
    "mars_shampoo": lambda params, precondition_frequency: MARS(params, variant="shampoo"),
    "mars_soap": lambda params, **kw: MARS(params, variant="soap", **kw),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_temporaries_stay_within_the_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of all tensors of a shape at once took as much again as their state."""
    shape = (96, 64)
    params = [Parameter(torch.randn(shape)) for _ in range(48)]
    optimizer = OPTIMIZERS[name](params, precondition_frequency=1)
    plan = optimizer.plan(optimizer.param_groups[0], shape)
    budget = 4 * temporary_bytes(plan, torch.float32)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", budget)
    for param in params:
        param.grad = torch.randn(shape)
    optimizer.step()
    optimizer.step()
    assert peak(optimizer.step) <= 1.05 * budget
