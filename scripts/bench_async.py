"""Shampoo with roots that are 1200 steps late: final loss compared with synchronous roots, and the time saved.

python scripts/bench_async.py            # 3000 steps, three runs interleaved
python scripts/bench_async.py --steps 60 --frequency 20

Trains one small GPT-2 on the sources of Python's standard library three times, in interleaved slices, so that a slow
moment of the machine affects all three: with roots computed in place, in the background with a delay of a whole
period, and only once. Scalable Shampoo (arXiv:2002.09018) reports that delays up to 1200 steps do no harm.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

from hf_soap import Shampoo
from hf_soap.cli.compare.corpus import Corpus, build_corpus

SLICE = 20


@dataclass
class Run:
    """One model in training."""

    optimizer_options: dict[str, Any]
    model: GPT2LMHeadModel
    optimizer: Shampoo = field(init=False)
    step_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = Shampoo(self.model.parameters(), **self.optimizer_options)

    def train(self, corpus: Corpus, first: int, last: int, *, steps: int, lr: float, batch_size: int) -> None:
        """Makes steps first..last-1 on batches that depend only on the step, with a cosine schedule."""
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            batch = corpus.train[torch.randint(len(corpus.train), (batch_size,), generator=generator)]
            began = time.perf_counter()
            self.model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            warm = min(1.0, (step + 1) / (0.1 * steps))
            for group in self.optimizer.param_groups:
                group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step_seconds.append(time.perf_counter() - began)

    @torch.no_grad()
    def loss(self, corpus: Corpus) -> float:
        """Loss on the held-out text."""
        batches = corpus.held_out.split(32)
        return sum(self.model(input_ids=b, labels=b).loss.item() * len(b) for b in batches) / len(corpus.held_out)


def main(
    steps: Annotated[int, typer.Option(help="training steps")] = 3000,
    frequency: Annotated[int, typer.Option(help="steps between two computations, and the delay")] = 1200,
    width: Annotated[int, typer.Option(help="width of the model")] = 64,
    layers: Annotated[int, typer.Option(help="layers of the model")] = 2,
    batch_size: Annotated[int, typer.Option(help="sequences a step")] = 8,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 3e-3,
) -> None:
    """Train the three runs and print loss and time."""
    corpus = build_corpus(None, vocab_size=512, seq_len=64, max_held_out=256)
    shared = {"precondition_frequency": frequency, "start_step": 200, "shampoo_beta": 0.99, "max_precond_dim": 1024}
    never = {**shared, "precondition_frequency": 10 * steps}
    options = {
        "in place": shared,
        f"in the background, delay {frequency}": {**shared, "asynchronous": True, "delay": frequency},
        "once, at step 200": never,
    }
    runs: dict[str, Run] = {}
    for name, settings in options.items():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=512, n_positions=64, n_embd=width, n_layer=layers, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        runs[name] = Run(settings, GPT2LMHeadModel(config))
    for first in range(0, steps, SLICE):
        for run in runs.values():
            last = min(first + SLICE, steps)
            run.train(corpus, first, last, steps=steps, lr=lr, batch_size=batch_size)
    baseline = sum(runs["once, at step 200"].step_seconds)
    numel = sum(p.numel() for p in next(iter(runs.values())).model.parameters())
    table = Table(title=f"{numel:,} parameters, {steps} steps, roots every {frequency}")
    for heading in ("roots", "held-out loss", "seconds", "of the run that never refreshes", "worst step ms"):
        table.add_column(heading, justify="left" if heading == "roots" else "right")
    for name, run in runs.items():
        seconds = sum(run.step_seconds)
        worst = f"{max(run.step_seconds[steps // 10 :]) * 1e3:.0f}"
        table.add_row(name, f"{run.loss(corpus):.4f}", f"{seconds:.1f}", f"{seconds / baseline:.3f}", worst)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
