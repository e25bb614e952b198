"""Who owns what."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

from hf_soap import MARS, SOAP, Shampoo
from hf_soap.distributed import owners
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.planning.costs import cost
from hf_soap.rules.soap import SoapRule

MODELS = {
    "gpt2": GPT2Config(),
    "llama": LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16),
}


def loads(optimizer: BlockOptimizer) -> list[tuple[float, float]]:
    """Work and bytes of every matrix that an owner preconditions."""
    found = []
    for member in optimizer.members():
        plan = optimizer.plan(member.settings, member.param.shape)
        if not plan.traits.is_elementwise:
            found.append((plan.work(), optimizer._bytes_of(member)))
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("make", [SOAP, Shampoo, MARS], ids=lambda make: make.__name__)
def test_no_rank_holds_much_more_than_its_share(name: str, ranks: int, make: Callable[..., Any]) -> None:
    """Within a tenth, on the matrices of real models; embeddings and vectors are sharded evenly anyway."""
    config: AutoConfig = MODELS[name]
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    matrices = [p for key, p in model.named_parameters() if p.dim() == 2 and "wte" not in key and "embed" not in key]
    matrices = [p for p in matrices if max(p.shape) < 10000]
    every = loads(make(matrices))
    assignment = owners.assign(every, ranks)
    for kind in (0, 1):
        total = sum(load[kind] for load in every)
        held = [
            sum(load[kind] for load, owner in zip(every, assignment, strict=True) if owner == r) for r in range(ranks)
        ]
        assert max(held) <= 1.1 * total / ranks


def test_one_large_matrix_takes_a_rank_of_its_own() -> None:
    assert owners.assign([(1, 1), (100, 100), (1, 1), (1, 1)], 2) == [1, 0, 1, 1]


def test_nothing_to_own() -> None:
    assert owners.assign([], 3) == []


def test_owners_are_counted_with_the_state_that_they_keep() -> None:
    """The step count of an owner was subtracted as float32 from what had it as float64."""
    optimizer = SOAP([nn.Parameter(torch.ones(6, 4))])
    assert cost(optimizer, ranks=2, mode="ddp, owner").state == optimizer.state_bytes()


def test_a_step_that_fails_drops_the_state_that_was_brought_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next state_dict would have saved what the step had changed as it was before."""
    param = nn.Parameter(torch.ones(6, 4))
    optimizer = SOAP([param])

    def fail(*_: object) -> None:
        raise MemoryError

    for _ in range(2):
        param.grad = torch.ones(6, 4)
        optimizer.step()
    monkeypatch.setattr(optimizer, "spreads_state", lambda: True)
    optimizer.consolidate()
    assert optimizer.state_dict()["state"]
    monkeypatch.setattr(SoapRule, "update", fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"call consolidate\(\)"):
        optimizer.state_dict()
