"""Settings and results of one training run of ``hf-soap compare``, and the log of all runs."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

VERSIONED = ("torch", "transformers", "accelerate", "peft", "tokenizers")

Json = dict[str, Any]


@dataclass(frozen=True)
class RunSettings:
    """All settings that determine a run on a given corpus.

    Attributes:
        optimizer: A name for ``TrainingArguments(optim=...)``.
        optim_args: Options of the optimizer, as for ``TrainingArguments(optim_args=...)``.
        lr: Peak learning rate.
        adam_beta2: The value of ``TrainingArguments(adam_beta2=...)``; with 0.999, our optimizers use their own.
        steps: Training steps; the schedule ends with them.
        batch_size: Sequences per step.
        model: Folder or name of the model to fine-tune; empty for a new GPT-2 of the sizes below.
        lora_r: Rank of LoRA on all linear layers; 0 trains all weights.
        layers: Transformer blocks of a new model.
        width: Size of its hidden states.
        heads: Attention heads.
        schedule: A name for ``TrainingArguments(lr_scheduler_type=...)``, or ``NAME:OPTION=VALUE,...``.
        warmup: Fraction of the steps over which the learning rate rises.
        weight_decay: Decoupled weight decay of the matrices.
        max_grad_norm: Gradients are clipped to this norm.
        eval_every: Steps between evaluations.
        seed: Seed of new weights and of the data order.
        adam_beta1: The value of ``TrainingArguments(adam_beta1=...)``; with 0.9, our optimizers use their own.
    """

    optimizer: str
    optim_args: str
    lr: float
    adam_beta2: float
    steps: int
    batch_size: int
    model: str
    lora_r: int
    layers: int
    width: int
    heads: int
    schedule: str
    warmup: float
    weight_decay: float
    max_grad_norm: float
    eval_every: int
    seed: int
    adam_beta1: float = 0.9  # logs of before have none

    @property
    def label(self) -> str:
        """The optimizer and its options, as typed for ``compare``."""
        return f"{self.optimizer}:{self.optim_args}" if self.optim_args else self.optimizer


@dataclass(frozen=True)
class EvalPoint:
    """Loss on the held-out text after ``step`` steps, which took ``seconds``."""

    step: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class RunResult:
    """The result of one run.

    Attributes:
        settings: The settings of the run.
        evals: Held-out loss along the way, from step 0 to the last step.
        train_losses: Training loss of every step.
        seconds: Time of all training steps, without evaluations and the checkpoint.
        optimizer_seconds: The part of that time spent in ``optimizer.step``.
        state_bytes: Size of the optimizer's state.
        parameters: Number of trained parameters.
        checkpoint: Folder of the final checkpoint: model, tokenizer, optimizer and scheduler.
    """

    settings: RunSettings
    evals: list[EvalPoint]
    train_losses: list[float]
    seconds: float
    optimizer_seconds: float
    state_bytes: int
    parameters: int
    checkpoint: Path

    @property
    def final_loss(self) -> float:
        """Held-out loss after the last step; infinite for a run that diverged."""
        loss = self.evals[-1].loss
        return loss if math.isfinite(loss) else math.inf

    def steps_to(self, loss: float) -> float | None:
        """Find the step at which the held-out loss first reached a value.

        Args:
            loss: The value to reach.

        Returns:
            The step, interpolated between two evaluations; None if the run did not reach it.
        """
        if not math.isfinite(loss):
            return None
        reached = next((i for i, point in enumerate(self.evals) if point.loss <= loss), None)
        if not reached:
            return reached
        before, after = self.evals[reached - 1], self.evals[reached]
        return before.step + (after.step - before.step) * (before.loss - loss) / (before.loss - after.loss)

    def to_json(self) -> Json:
        """Return plain values, with None for losses that are not finite."""
        evals = [asdict(point) | {"loss": finite(point.loss)} for point in self.evals]
        losses = [finite(loss) for loss in self.train_losses]
        return asdict(self) | {"evals": evals, "train_losses": losses, "checkpoint": str(self.checkpoint)}

    @classmethod
    def from_json(cls, values: Json) -> RunResult:
        """Read what :meth:`to_json` returned; a loss that was not finite comes back as NaN."""
        return cls(
            **values
            | {
                "settings": RunSettings(**values["settings"]),
                "evals": [EvalPoint(**point | {"loss": _number(point["loss"])}) for point in values["evals"]],
                "train_losses": [_number(loss) for loss in values["train_losses"]],
                "checkpoint": Path(values["checkpoint"]),
            }
        )


class RunLog:
    """A file of JSON lines with every finished run, each written as soon as it ends.

    A run counts as done if its settings and its conditions are the same as now.
    """

    def __init__(self, path: Path, conditions: Json, notes: Json | None = None) -> None:
        """Reads the runs of an earlier call.

        Args:
            path: The file, which need not exist.
            conditions: Everything apart from the settings that makes another run of it, as JSON values.
            notes: JSON values that are kept with each new run and do not make it another one.
        """
        self.path = path
        self.conditions = conditions
        self.notes = notes or {}
        self._done = {
            RunSettings(**entry["run"]["settings"]): (RunResult.from_json(entry["run"]), entry.get("notes", {}))
            for entry in self._entries()
            if entry["conditions"] == self.conditions
        }

    def __len__(self) -> int:
        return len(self._done)

    def __iter__(self) -> Iterator[tuple[RunResult, Json]]:
        """Yield the finished runs, each with its notes."""
        return iter(self._done.values())

    def get(self, settings: RunSettings) -> RunResult | None:
        """Return the run with these settings, if there was one."""
        return self._done[settings][0] if settings in self._done else None

    def add(self, result: RunResult) -> None:
        """Write a run to the file."""
        self._done[result.settings] = result, self.notes
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"conditions": self.conditions, "notes": self.notes, "run": result.to_json()}
        line = json.dumps(entry, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            # On a separate line, even after one that a killed process left incomplete.
            file.write(f"\n{line}\n" if file.tell() else f"{line}\n")

    def _entries(self) -> Iterator[Json]:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in filter(None, lines):
            try:
                entry = json.loads(line)
                RunSettings(**entry["run"]["settings"])
            except (ValueError, TypeError):
                continue  # an incomplete line, or the settings of another version
            yield entry


def present_conditions(data: str, model: str = "") -> Json:
    """Return everything apart from the settings that determines a run: data, model, code, packages and machine.

    Args:
        data: Digest of the data.
        model: Folder of the model from which the run starts, or an empty string.
    """
    files = sorted(Path(model).glob("*.safetensors")) if model else []
    return {
        "data": data,
        "model": [f"{file.name} {file.stat().st_mtime_ns}" for file in files],
        "code": code_digest(),
        **versions(),
        **machine(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that training uses."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with suppress(PackageNotFoundError):  # peft is an extra
            found[name] = version(name)
    return found


def machine() -> Json:
    """Return the hardware of a run: platform, device, number of threads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"platform": platform.platform(), "device": device, "threads": torch.get_num_threads()}


def code_digest() -> str:
    """Return a digest of the code that determines a result: an edited optimizer counts as another one."""
    commands, training = Path(__file__).parents[1], Path(__file__).with_name("training.py")
    sources = [path for path in commands.parent.rglob("*.py") if commands not in path.parents] + [training]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()


def finite(value: float) -> float | None:
    """Return the value, or None for JSON, which has no infinity."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
