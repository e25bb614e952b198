"""Learning rates and decay by the width of the model (μP)."""

import math
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from hf_soap import (
    SOAP,
    KlShampooConfig,
    MarsConfig,
    MarsShampooConfig,
    MarsSoapConfig,
    MuonConfig,
    Shampoo,
    ShampooConfig,
    SoapConfig,
)
from hf_soap.config.options import OptimizerConfig
from hf_soap.optimizers.grouping import create
from hf_soap.optimizers.names import ENTRIES

WIDTH = 32


def rates(model: nn.Module, config: OptimizerConfig, lr: float = 0.1) -> dict[str, tuple[float, float]]:
    """Learning rate, and decay times learning rate, of each parameter."""
    named = dict(model.named_parameters())
    groups = [{"params": list(named.values()), "lr": lr, "weight_decay": 0.5}]
    optimizer = create(ENTRIES[config.name].optimizer, groups, model, config, **config.constructor_kwargs())
    found = {}
    for member in optimizer.members():
        own_lr, decay = optimizer.rates_from(member.rates, optimizer.plan_of(member.settings, member.param))
        found[member.name] = (float(own_lr), float(own_lr) * decay)
    return found


def model_of(width: int = WIDTH, **config: Any) -> GPT2LMHeadModel:
    return tiny.gpt2(n_embd=width, n_head=2, **config)


@pytest.mark.parametrize("config", [SoapConfig, ShampooConfig, KlShampooConfig, MarsSoapConfig])
@pytest.mark.parametrize("base", [8, 32, 64])
def test_rates_of_hidden_matrices_are_in_proportion_to_one_over_the_width(config: Any, base: int) -> None:
    found = rates(model_of(), config(mup_base_width=base))
    ratio = base / WIDTH
    assert found["transformer.h.0.attn.c_attn.weight"] == pytest.approx((0.1 * ratio, 0.05 * ratio))
    assert found["transformer.wte.weight"] == pytest.approx((0.1 * ratio, 0.05 * ratio))  # the head is tied to it
    assert found["transformer.h.0.ln_1.weight"] == pytest.approx((0.1, 0.05))


def test_a_separate_head_is_scaled() -> None:
    found = rates(model_of(tie_word_embeddings=False), SoapConfig(mup_base_width=8))
    assert found["lm_head.weight"] == pytest.approx((0.025, 0.0125))
    assert found["transformer.wte.weight"] == pytest.approx((0.1, 0.05))


def test_spectral_updates_keep_the_learning_rate() -> None:
    found = rates(model_of(tie_word_embeddings=False), MuonConfig(mup_base_width=8))
    assert found["transformer.h.0.mlp.c_fc.weight"] == pytest.approx((0.1, 0.0125))
    assert found["lm_head.weight"] == pytest.approx((7.5e-5, 3.75e-5))  # a quarter of lr_1d
    adams = rates(model_of(), MuonConfig(mup_base_width=8, scale="rms"))
    assert adams["transformer.h.0.mlp.c_fc.weight"] == pytest.approx((0.025, 0.0125))


ATTENTION, OTHER = "transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight"
SPECTRAL, ADAMS = (0.1, 0.0125), (0.025, 0.0125)


@pytest.mark.parametrize(
    ("config", "attention", "other"),
    [
        (MuonConfig(mup_base_width=8, modules={"attn": {"scale": "rms"}}), ADAMS, SPECTRAL),
        (MuonConfig(mup_base_width=8, scale="rms", modules={"attn": {"scale": "aspect"}}), SPECTRAL, ADAMS),
        (ShampooConfig(mup_base_width=8, modules={"attn": {"graft": None}}), SPECTRAL, ADAMS),
        (ShampooConfig(mup_base_width=8, graft=None, adam_modules="attn"), ADAMS, SPECTRAL),
        (ShampooConfig(mup_base_width=8, graft=None, modules={"attn": {"exponent": -0.5}}), ADAMS, SPECTRAL),
        (MarsConfig(mup_base_width=8, modules={"attn": {"rule": "shampoo"}}), SPECTRAL, ADAMS),
        (MarsShampooConfig(mup_base_width=8, modules={"attn": {"rule": "adamw"}}), ADAMS, SPECTRAL),
    ],
    ids=lambda value: value.to_optim_args() if isinstance(value, OptimizerConfig) else "",
)
def test_each_tensor_has_the_rates_of_its_rule(config: OptimizerConfig, attention: Any, other: Any) -> None:
    found = rates(model_of(), config)
    assert found[ATTENTION] == pytest.approx(attention)
    assert found[OTHER] == pytest.approx(other)


@pytest.mark.parametrize("config", [MuonConfig, MarsShampooConfig])
def test_a_kernel_that_adamw_updates_has_adamws_rates(config: Any) -> None:
    class Mixer(nn.Module):
        """Of the shapes of Mamba."""

        def __init__(self) -> None:
            super().__init__()
            self.config = tiny.gpt2(n_embd=WIDTH, n_head=2).config
            self.conv1d = nn.Conv1d(64, 64, 4, groups=64)

    before, after = rates(Mixer(), config()), rates(Mixer(), config(mup_base_width=8))
    assert after["conv1d.weight"][0] == pytest.approx(before["conv1d.weight"][0] / 4)
    assert after["conv1d.bias"] == before["conv1d.bias"]


def test_tensors_with_one_long_dimension_are_vectors() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = tiny.gpt2(n_embd=WIDTH, n_head=2).config
            self.cls_token = nn.Parameter(torch.ones(1, 1, WIDTH))

    assert rates(Tokens(), SoapConfig(mup_base_width=8))["cls_token"] == (0.1, 0.05)


def test_the_decay_of_a_group_without_one_is_the_optimizers() -> None:
    model = model_of()
    config = ShampooConfig(mup_base_width=8, graft=None)
    optimizer = create(Shampoo, model.parameters(), model, config, weight_decay=0.2, **config.constructor_kwargs())
    (own,) = [member.own for member in optimizer.members() if member.name == ATTENTION]
    assert own == {"weight_decay": pytest.approx(0.05)}


def test_steps_in_proportion_to_the_norm_keep_their_rates() -> None:
    found = rates(model_of(tie_word_embeddings=False), SoapConfig(mup_base_width=8, norm="hyperball"))
    assert found["transformer.h.0.mlp.c_fc.weight"] == pytest.approx((0.1, 0.05))
    assert found["lm_head.weight"] == pytest.approx((0.025, 0.0125))  # an ordinary step


def test_rates_that_modules_set_are_not_changed() -> None:
    own = {r"attn": {"lr_factor": 2.0}, r"mlp\.c_fc": {"weight_decay": 0.0}}
    found = rates(model_of(), SoapConfig(mup_base_width=8, modules=own))
    assert found["transformer.h.0.attn.c_attn.weight"] == pytest.approx((0.2, 0.1))
    assert found["transformer.h.0.mlp.c_fc.weight"] == pytest.approx((0.025, 0.0))


def test_a_model_without_a_width_is_refused() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"mup_base_width=8 got a model without config.hidden_size, wanted"):
        create(SOAP, model.parameters(), model, SoapConfig(mup_base_width=8))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "options"), [(SoapConfig, {"refresh_growth": 0.0}), (MuonConfig, {})])
def test_the_best_learning_rate_of_a_small_model_is_that_of_a_large_one(config: Any, options: dict[str, Any]) -> None:
    """From width 64 to 512 the best rate of a sweep in powers of two moves by at most one power."""
    best = {}
    for width in (64, 512):
        losses = {}
        for power in range(-8, -1):
            model = model_of(width, n_layer=2, vocab_size=32, n_positions=32)
            losses[power] = trained(model, config(mup_base_width=64, **options), 2.0**power)
        best[width] = min(losses, key=losses.__getitem__)
    assert abs(best[64] - best[512]) <= 1


def trained(model: GPT2LMHeadModel, options: OptimizerConfig, lr: float, steps: int = 40) -> float:
    """Trains on sequences in which every number is the sum of the two before it, and returns the last loss."""
    cls, kwargs = ENTRIES[options.name].optimizer, {**options.constructor_kwargs(), "lr": lr}
    optimizer = create(cls, model.parameters(), model, options, **kwargs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 4) * (1 - step / steps))
    generator = torch.Generator().manual_seed(0)
    loss = math.inf
    for _ in range(steps):
        tokens = torch.randint(32, (32, 32), generator=generator)
        for place in range(2, 32):
            tokens[:, place] = (tokens[:, place - 1] + tokens[:, place - 2]) % 32
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss = output.loss.item()
    return loss if math.isfinite(loss) else math.inf
