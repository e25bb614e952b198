"""LoRA, DoRA and full fine-tuning of a tiny GPT-2, by the Trainer and by TRL's."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers import assert_same
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

from hf_soap import MARS, SOAP

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

OPTIM_ARGS = {"soap": "precondition_frequency=2", "mars": None}

STEPS = 8


def adapter(method: str) -> LoraConfig | None:
    if method == "full":
        return None
    return LoraConfig(
        r=4,
        lora_dropout=0.1,  # so that a resumed run must restore the random state of the adapters too
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
        use_dora=method == "dora",
        task_type="CAUSAL_LM",
    )


def plain_trainer(folder: Path, method: str, **changes: Any) -> Trainer:
    model: nn.Module = tiny.gpt2()
    if config := adapter(method):
        model = get_peft_model(model, config)
    return Trainer(model, tiny.arguments(folder, **changes), train_dataset=tiny.Counting())


def sft_trainer(folder: Path, method: str, **changes: Any) -> Trainer:
    trainer: Trainer = tiny.sft_trainer(folder, extra={"peft_config": adapter(method)}, **changes)
    return trainer


TRAINERS = {"trainer": plain_trainer, "sft": sft_trainer}


def train(folder: Path, trainer: str, method: str, optim: str, *, resume: Path | None = None) -> Trainer:
    settings = {"optim": optim, "optim_args": OPTIM_ARGS[optim], "save_strategy": "steps", "save_steps": STEPS // 2}
    torch.manual_seed(1)  # of the adapters
    made = TRAINERS[trainer](folder, method, learning_rate=1e-2, **settings)
    made.train(resume_from_checkpoint=resume and str(resume))
    return made


def outcome(trainer: Trainer) -> Any:
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}, optimizer.state_dict()


FAST = {("trainer", "dora", "soap"), ("sft", "lora", "soap"), ("sft", "full", "mars")}
COVERED = {("trainer", "full", "soap"), ("trainer", "lora", "soap")}
"""By the table of resumed runs in test_trainer.py."""


@pytest.mark.parametrize(
    ("trainer", "method", "optim"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in (
            (trainer, method, optim)
            for trainer in TRAINERS
            for method in ("full", "lora", "dora")
            for optim in OPTIM_ARGS
        )
        if case not in COVERED
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(trainer: str, method: str, optim: str, tmp_path: Path) -> None:
    """Bit for bit; only what is adapted has moved, and all of it has."""
    whole = train(tmp_path / "whole", trainer, method, optim)
    resumed = train(
        tmp_path / "resumed", trainer, method, optim, resume=tmp_path / "whole" / f"checkpoint-{STEPS // 2}"
    )
    assert resumed.state.global_step == whole.state.global_step == STEPS
    assert_same(outcome(resumed), outcome(whole))

    optimizer: Any = getattr(whole.optimizer, "optimizer", whole.optimizer)
    assert type(optimizer) is {"soap": SOAP, "mars": MARS}[optim]
    trained = {name for name, param in whole.model.named_parameters() if param.requires_grad}
    assert {id(param) for group in optimizer.param_groups for param in group["params"]} == {
        id(param) for param in whole.model.parameters() if param.requires_grad
    }
    kinds = {"full": 28, "lora": 2 * 4, "dora": 3 * 4}
    assert len(trained) == kinds[method], "GPT-2 of two layers, or A, B and DoRA's magnitude for four matrices"
    torch.manual_seed(1)
    start = TRAINERS[trainer](tmp_path / "start", method, optim=optim, learning_rate=1e-2).model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, start[name]) == (name not in trained and name != "lm_head.weight"), name


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    weights = other.state_dict()
    assert one.state_dict().keys() == weights.keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, weights[name]), name


def logits(model: nn.Module) -> Tensor:
    tokens = torch.arange(12)[None]
    model.eval()
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens).logits
    return result


@pytest.mark.parametrize(
    ("method", "optim"),
    [
        ("lora", "soap"),
        pytest.param("dora", "soap", marks=pytest.mark.slow),
        pytest.param("lora", "mars", marks=pytest.mark.slow),
        pytest.param("dora", "mars", marks=pytest.mark.slow),
    ],
)
def test_a_merged_adapter_saves_and_loads(method: str, optim: str, tmp_path: Path) -> None:
    trainer = train(tmp_path / "run", "trainer", method, optim)
    model = trainer.model
    assert isinstance(model, PeftModel)
    before, trained = logits(tiny.gpt2()), logits(model)
    assert (trained - before).abs().max() > 1e-2, "training moved the logits"

    model.save_pretrained(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "adapter")
    assert_same_weights(adapted, model)
    # Where weights lie in memory decides how products round.
    torch.testing.assert_close(logits(adapted), trained, rtol=1e-5, atol=1e-6)

    merged = model.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)  # W + BA is rounded once, not per term
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_weights(loaded, merged)
    torch.testing.assert_close(logits(loaded), logits(merged), rtol=1e-5, atol=1e-6)
    assert not any("lora" in name for name in loaded.state_dict())
