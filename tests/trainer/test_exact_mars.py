"""Exact MARS through the real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Counting, arguments, gpt2
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from hf_soap import MARS, SoapTrainer, SoapTrainerMixin


class Recording:
    """Remembers the batches that the Trainer drew and the random state before each, to train on the same again."""

    seen: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen = [*getattr(self, "seen", []), (torch.get_rng_state(), dict(inputs))]
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]


class RecordingTrainer(Recording, SoapTrainer):
    pass


class RecordingSeq2SeqTrainer(Recording, SoapTrainerMixin, Seq2SeqTrainer):
    pass


EXACT = {"optim": "mars", "optim_args": "exact=true", "lr_scheduler_type": "constant", "warmup_steps": 0}


@pytest.mark.parametrize(
    ("trainer_class", "arguments_class"),
    [(RecordingTrainer, TrainingArguments), (RecordingSeq2SeqTrainer, Seq2SeqTrainingArguments)],
)
def test_trainer_equals_a_loop_written_by_hand(trainer_class: Any, arguments_class: Any, tmp_path: Path) -> None:
    """Accumulation over two batches, clipping and dropout: the second pass must see the same units dropped.

    In float64, where the rounding noise in the gradient of attention's key bias, which is zero, stays below ε. The
    model's loss is computed in float32 all the same, and its noise is what the tolerance leaves room for.
    """
    accumulate, steps, clip = 2, 4, 0.5
    args = arguments(
        tmp_path, arguments_class, max_steps=steps, gradient_accumulation_steps=accumulate, max_grad_norm=clip, **EXACT
    )
    trainer = trainer_class(model=gpt2().double(), args=args, train_dataset=Counting())
    trainer.train()

    model = gpt2().double().train()
    optimizer = MARS(model.parameters(), lr=args.learning_rate, weight_decay_1d=0.0, exact=True)
    previous: dict[str, torch.Tensor] | None = None

    def gradients(window: list[Any]) -> list[torch.Tensor]:
        model.zero_grad()
        for state, batch in window:
            torch.set_rng_state(state)
            (model(**batch).loss / accumulate).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for step in range(steps):
        window = trainer.seen[step * accumulate : (step + 1) * accumulate]
        current = {name: value.detach().clone() for name, value in model.state_dict().items()}
        here = gradients(window)
        there = [torch.zeros_like(grad) for grad in here]
        if previous is not None:
            model.load_state_dict(previous)
            there = gradients(window)
            model.load_state_dict(current)
        for parameter, grad, behind in zip(model.parameters(), here, there, strict=True):
            correction = 0.025 * 0.95 / 0.05 * (grad - behind) if parameter.dim() == 2 else 0.0
            parameter.grad = grad + correction
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer._corrected = True
        optimizer.step()
        previous = current
    for (name, got), wanted in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_plain_trainer_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = gpt2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(model=model, args=arguments(tmp_path, **EXACT), train_dataset=Counting())
    with pytest.raises(RuntimeError, match="SoapTrainer"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """The weights before the last update are part of the state: without them the first resumed step is another."""
    changes: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 6,
    }
    changes |= {"max_steps": 6, **EXACT}
    whole = SoapTrainer(model=gpt2(), args=arguments(tmp_path / "whole", **changes), train_dataset=Counting())
    whole.train()
    resumed = SoapTrainer(model=gpt2(), args=arguments(tmp_path / "resumed", **changes), train_dataset=Counting())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for got, wanted in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, wanted)


class Buffered(GPT2LMHeadModel):
    """Has buffers of all kinds: expanded, written into without and with a new version, and replaced."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.norm = torch.nn.BatchNorm1d(config.n_embd, affine=False)
        self.register_buffer("mask", torch.ones(1, 5).expand(4, 5))
        self.register_buffer("filled", torch.zeros(1, 5).expand(4, 5), persistent=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input_ids: Any, labels: Any) -> Any:
        if self.training:
            self.norm(self.transformer.wte.weight.detach())
            self.filled.fill_(self.filled[0, 0].item() + 1)
            self.seen = self.seen + 1
        return super().forward(input_ids, labels=labels)


def test_a_second_pass_leaves_buffers_as_they_were(tmp_path: Path) -> None:
    """A buffer that is expanded stopped the run, and one that the forward pass replaces was counted twice."""
    torch.manual_seed(0)
    model = Buffered(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    SoapTrainer(model=model, args=arguments(tmp_path, max_steps=3, **EXACT), train_dataset=Counting()).train()
    assert [float(model.norm.num_batches_tracked), float(model.seen), float(model.filled[3, 4])] == [3, 3, 3]
    assert model.mask.stride() == (0, 1)
    assert model.mask.eq(1).all()
