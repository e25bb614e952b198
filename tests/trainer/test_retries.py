"""Trainings that run out of memory and begin again, and second passes that must leave no trace."""

import logging
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
from helpers import parameters, train
from replaying import assert_replayable, recorded
from torch import nn
from transformers import GPT2LMHeadModel

from hf_soap import SOAP, SoapTrainer
from hf_soap.engine.optimizer import unwrapped
from hf_soap.linalg import decompositions, eigenbases

FREQUENT = "precondition_frequency=2"
EXACT = {"optim": "mars", "optim_args": "exact=true"}
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Hungry(GPT2LMHeadModel):
    """Has memory for 7 sequences from its fourth call on."""

    calls = 0

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls > 3 and len(input_ids) > 7:
            raise RuntimeError(OUT_OF_MEMORY)
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


def hungry() -> nn.Module:
    model = tiny.gpt2()
    model.__class__ = Hungry
    return model


SEARCH: dict[str, Any] = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "max_steps": 4}


def test_smaller_batches_after_running_out_of_memory(tmp_path: Path) -> None:
    """The optimizer goes on with the weights that it has moved, as AdamW does, and takes no step twice."""
    ours = recorded(tmp_path, model=hungry(), optim_args=FREQUENT, **SEARCH)
    assert_replayable(*ours, precondition_frequency=2)
    adamw = recorded(tmp_path, model=hungry(), optim="adamw_torch", **SEARCH)
    assert ours[1].batches == adamw[1].batches
    assert ours[1].rates == adamw[1].rates
    assert len(ours[1].batches[0]) == 8
    assert len(ours[1].batches[-1]) == 7


class Watching(SoapTrainer):
    sizes: list[list[int]]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.sizes = [*getattr(self, "sizes", []), len(inputs["input_ids"])]
        assert not self._window or not self.accelerator.sync_gradients
        return loss


def test_exact_mars_forgets_the_batch_that_was_too_large(tmp_path: Path) -> None:
    """It was replayed at the previous weights with the next one, where memory ran out again."""
    trainer, _, _ = recorded(tmp_path, cls=Watching, model=hungry(), **EXACT, **SEARCH)
    assert trainer.sizes == [8, 8, 7, 7, 7, 7]


@pytest.mark.parametrize(("optim", "calls"), [("soap", 1), ("soap", 3), ("shampoo", 2)])
def test_a_step_that_runs_out_of_memory_leaves_nothing_half_done(
    optim: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tensors whose first step failed counted as seeded, with bases of zeros: they never moved again."""
    caplog.set_level(logging.WARNING, "hf_soap")
    asked = 0

    def scarce(decompose: Any) -> Any:
        def decomposed(*args: Any, **kwargs: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked == calls:
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            return decompose(*args, **kwargs)

        return decomposed

    monkeypatch.setattr(torch.linalg, "eigh", scarce(torch.linalg.eigh))
    trainer, _, before = recorded(tmp_path, optim=optim, optim_args=FREQUENT, **{**SEARCH, "max_steps": 6})
    assert asked > calls
    assert "A step was broken off by OutOfMemoryError" in caplog.text
    optimizer = unwrapped(trainer.optimizer)
    for name, param in trainer.model.named_parameters():
        assert param.isfinite().all(), name
        assert not torch.equal(param, before[name]), name
        for role, value in optimizer.state[param].items():
            if role.startswith("basis"):
                unit = torch.eye(value.shape[-1]).expand_as(value)
                torch.testing.assert_close(value.mT @ value, unit, rtol=0, atol=1e-4, msg=f"{name}: {role}")


@pytest.mark.parametrize("at", [0, 1, 4])
def test_what_was_broken_off_starts_anew_and_the_rest_goes_on(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh optimizer of the broken tensors alone ends at the same bits."""
    shapes = [(6, 6), (4, 8), (6, 6)]
    params, others, alone = parameters(shapes), parameters(shapes), parameters(shapes)
    optimizer, whole = (SOAP(these, precondition_frequency=1) for these in (params, others))
    train(optimizer, params, range(at))
    train(whole, others, range(at))
    update, seed = eigenbases.refresh, decompositions.eigenbasis

    def failing(wanted: Any) -> Any:
        def called(factor: torch.Tensor, *args: Any) -> Any:
            if factor.shape[-1] == 4:
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            return wanted(factor, *args)

        return called

    with monkeypatch.context() as patch:
        patch.setattr(eigenbases, "refresh", failing(update))
        patch.setattr(decompositions, "eigenbasis", failing(seed))
        with pytest.raises(torch.OutOfMemoryError):
            train(optimizer, params, [at])
    train(whole, others, [at])
    for one, other in ((0, 0), (2, 2)):  # stepped before the failure
        assert torch.equal(params[one], others[other])
    with torch.no_grad():
        alone[1].copy_(params[1])
    fresh = SOAP([alone[1]], precondition_frequency=1)
    for step in range(at + 1, at + 4):
        train(whole, others, [step])
        train(optimizer, params, [step])
        grad = params[1].grad
        alone[1].grad = grad.clone()
        fresh.step()
        assert torch.equal(params[1], alone[1])
    assert torch.equal(params[0], others[0])
    assert optimizer.state[params[1]]["step"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# Exact MARS: the second pass leaves no trace
# ---------------------------------------------------------------------------------------------------------------------


class Masking(nn.Module):
    """Masks as speech models do, by the numbers of numpy and Python, and normalises by batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)
        self.drawn: list[tuple[float, float, float]] = []

    def forward(self, input_ids: Any = None, labels: Any = None) -> Any:
        mask = torch.from_numpy(numpy.random.rand(12) > 0.3)  # noqa: NPY002
        self.drawn.append((float(mask.sum()), random.random(), float(torch.rand(()))))
        return {"loss": self.last(self.norm(self.first(input_ids / 64.0 * mask).relu())).square().mean()}


def test_exact_mars_draws_the_same_numbers_and_counts_batches_once(tmp_path: Path) -> None:
    """Masks of numpy differed between the two passes, and running means took every batch in twice."""
    trainer, _, _ = recorded(tmp_path, cls=SoapTrainer, model=Masking(), **EXACT, max_steps=4)
    drawn = trainer.model.drawn
    assert len(drawn) == 1 + 2 * 3
    assert drawn[1::2] == drawn[2::2]
    assert len(set(drawn)) == 4
    assert trainer.model.norm.num_batches_tracked == 4


def test_exact_mars_sees_the_same_neftune_noise(tmp_path: Path) -> None:
    """Noise on the embeddings is drawn in the model: both passes must meet the same."""
    model = tiny.gpt2(embd_pdrop=0.0)
    noise: list[torch.Tensor] = []
    table = model.get_input_embeddings()

    class Noticing(SoapTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            hook = table.register_forward_hook(
                lambda module, given, output: noise.append(
                    (output - nn.functional.embedding(given[0], module.weight)).detach()
                )
            )
            try:
                return super().training_step(*args, **kwargs)
            finally:
                hook.remove()

    recorded(tmp_path, cls=Noticing, model=model, **EXACT, max_steps=3, neftune_noise_alpha=5.0)
    assert len(noise) == 1 + 2 * 2
    for one, other in zip(noise[1::2], noise[2::2], strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exact_mars_counts_the_tokens_of_trl_once(tmp_path: Path) -> None:
    """`num_tokens` in the log of SFTTrainer was nearly twice what had been trained on."""
    from hf_soap import SoapTrainerMixin

    def tokens(**changes: Any) -> Any:
        trainer = tiny.sft_trainer(tmp_path, SoapTrainerMixin, logging_steps=4, max_steps=4, **changes)
        trainer.train()
        return [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]

    assert tokens(**EXACT) == tokens(optim="adamw_torch") != []
