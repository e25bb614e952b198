"""``hf-soap compare``: the same small language model, trained once per optimizer."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from hf_soap.cli.corpus import Corpus
    from hf_soap.cli.training import RunResult

DEFAULT_LR = {
    "adamw_torch": 2.5e-3,
    "adamw_torch_fused": 2.5e-3,
    "soap": 1e-2,
    "kl_soap": 1e-2,
    "shampoo": 1e-2,
    "mars": 5e-3,
    "mars_adamw": 5e-3,
    "mars_lion": 5e-4,
    "mars_shampoo": 4e-2,
    "mars_soap": 1e-2,
}
"""Best of sweeps in powers of two on the default model and text; others and other settings need ``--lr``."""

DEFAULT_BETA2 = {"adamw_torch": 0.95, "adamw_torch_fused": 0.95}
"""Best of 0.95 and 0.999, each at its best learning rate. The Trainer's 0.999 leaves our optimizers their own."""

DEFAULT_STEPS = 120

ALIASES = {"adamw": "adamw_torch_fused"}

T = TypeVar("T")


def compare(
    optimizers: Annotated[
        list[str] | None,
        typer.Argument(help="Names that the Trainer takes; adamw is adamw_torch_fused.", show_default="adamw soap"),
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Gets the report and one checkpoint per optimizer.")] = Path(
        "compare"
    ),
    steps: Annotated[
        list[str] | None,
        typer.Option(help="Training steps: N for all, NAME=N for one.", show_default=str(DEFAULT_STEPS)),
    ] = None,
    lr: Annotated[
        list[str] | None,
        typer.Option(help="Peak learning rate: LR for all, NAME=LR for one.", show_default="tuned where known"),
    ] = None,
    adam_beta2: Annotated[
        list[str] | None,
        typer.Option(help="The Trainer's argument: BETA2 for all, NAME=BETA2 for one.", show_default="adamw=0.95"),
    ] = None,
    optim_args: Annotated[
        list[str] | None,
        typer.Option(help="Options of one optimizer: NAME=OPTION=VALUE,...", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 64,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 4,
    width: Annotated[int, typer.Option(min=1, help="Size of the hidden states.")] = 128,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 4,
    vocab_size: Annotated[int, typer.Option(min=256, help="Tokens of the BPE; 256 is raw bytes.")] = 1024,
    schedule: Annotated[str, typer.Option(help="A schedule that the Trainer knows.")] = "cosine",
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Fraction of the steps.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(min=0, help="Decoupled weight decay.")] = 0.01,
    max_grad_norm: Annotated[float, typer.Option(min=0, help="Clip gradients to this norm; 0 does not clip.")] = 1.0,
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between evaluations.", show_default="a twelfth of the steps")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A text file or a folder of them.", show_default="the sources of Python's standard library"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the data order.")] = 0,
) -> None:
    """Train the same small GPT-2 once per optimizer and compare loss, steps, time and memory.

    Weights, data and data order are the same for all. The first optimizer is the yardstick: "steps to" counts the
    steps until another one's held-out loss is down to that with which the first one ended. Within one run this is a
    hint, which can err either way: the learning rate has not decayed at that step, and a run of that length would have
    warmed up faster. `--steps NAME=N` gives an optimizer a schedule of its own length: the N at which it ends with the
    same loss is the fair count.

    Wall time is that of the training steps, without evaluations and checkpoint, on this machine as it is just now.
    """
    from transformers.utils import logging

    from hf_soap.cli.corpus import build_corpus
    from hf_soap.cli.training import RunSettings, check_settings, train_once

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    names = resolve_names(optimizers or ["adamw", "soap"])
    steps_of = dict.fromkeys(names, DEFAULT_STEPS) | per_optimizer("--steps", steps or [], names, _positive_int)
    lr_of = {name: DEFAULT_LR[name] for name in names if name in DEFAULT_LR}
    lr_of |= per_optimizer("--lr", lr or [], names, float)
    beta2_of = DEFAULT_BETA2 | per_optimizer("--adam-beta2", adam_beta2 or [], names, float)
    args_of = per_optimizer("--optim-args", optim_args or [], names, str)
    if missing := [name for name in names if name not in lr_of]:
        raise typer.BadParameter(f"no tuned learning rate is known for {missing[0]}; give one: --lr {missing[0]}=1e-3")
    runs = [
        RunSettings(
            optimizer=name,
            optim_args=args_of.get(name, ""),
            lr=lr_of[name],
            adam_beta2=beta2_of.get(name, 0.999),
            steps=steps_of[name],
            batch_size=batch_size,
            layers=layers,
            width=width,
            heads=heads,
            schedule=schedule,
            warmup=warmup,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            eval_every=eval_every or max(1, steps_of[name] // 12),
            seed=seed,
        )
        for name in names
    ]
    try:
        with console.status("Reading and tokenising text"):
            corpus = build_corpus(data, vocab_size=vocab_size, seq_len=seq_len, max_held_out=256)
        for run in runs:
            check_settings(run, corpus)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(corpus.source, highlight=False)

    results = []
    with Progress(*_columns(), console=console) as progress:
        for run in runs:
            task = progress.add_task(run.optimizer, total=run.steps)
            on_step = partial(_advance, progress, task)
            results.append(train_once(run, corpus, output_dir / run.optimizer, on_step))
    _report(console, output_dir, results, corpus)


def resolve_names(names: Sequence[str]) -> list[str]:
    """Resolve aliases and check the names of optimizers.

    Args:
        names: Names as typed.

    Returns:
        Names that ``TrainingArguments(optim=...)`` takes.

    Raises:
        typer.BadParameter: If the Trainer does not know a name, or one comes twice.
    """
    from transformers.training_args import OptimizerNames

    known = [member.value for member in OptimizerNames]
    resolved = [ALIASES.get(name, name) for name in names]
    for name in resolved:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"the Trainer knows {', '.join(sorted(known))}"
            raise typer.BadParameter(f"got the optimizer {name!r}, wanted one that the Trainer knows; {remedy}")
        if resolved.count(name) > 1:
            raise typer.BadParameter(f"got {name} twice, wanted each optimizer once; leave one out")
    return resolved


def per_optimizer(
    option: str, values: Sequence[str], names: Sequence[str], convert: Callable[[str], T]
) -> dict[str, T]:
    """Read an option that holds for all optimizers or for one of them.

    Args:
        option: The option's name, for errors.
        values: ``VALUE`` or ``NAME=VALUE``, as typed; what is said of one optimizer wins.
        names: The optimizers that are compared.
        convert: Makes the value of its text; a ValueError refuses it.

    Returns:
        Optimizer name to value, without the optimizers that no value was given for.

    Raises:
        typer.BadParameter: If a name is not compared, a value is refused or given twice.
    """
    common: dict[str, T] = {}
    special: dict[str, T] = {}
    for value in values:
        name, equals, text = value.partition("=")
        name = ALIASES.get(name, name)
        if equals and name not in names:
            raise typer.BadParameter(f"{option} {value} is for {name}, wanted one of {', '.join(names)}")
        try:
            new = {name: convert(text)} if equals else dict.fromkeys(names, convert(value))
        except ValueError as error:
            raise typer.BadParameter(f"{option} {value}: {error}") from error
        target = special if equals else common
        if target.keys() & new.keys():
            raise typer.BadParameter(f"{option} {value} comes on top of another one; give it once")
        target |= new
    return common | special


def _positive_int(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(f"must be >= 1, got {value}")
    return value


def _columns() -> tuple[ProgressColumn, ...]:
    name = TextColumn("{task.description}")
    return name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()


def _advance(progress: Progress, task: TaskID, step: int) -> None:
    progress.update(task, completed=step)


def _report(console: Console, output_dir: Path, results: list[RunResult], corpus: Corpus) -> None:
    from hf_soap.cli.report import plot, render, summarize, write_json

    rows = summarize(results)
    console.print(render(rows))
    for row in rows:
        console.print(f"{row.optimizer}: {row.checkpoint}", highlight=False, soft_wrap=True)
    write_json(output_dir / "compare.json", results, corpus)
    written = [output_dir / "compare.json"]
    try:
        plot(output_dir / "compare.png", results)
        written.append(output_dir / "compare.png")
    except ImportError:
        console.print("No plot, for want of matplotlib: pip install 'hf-soap[plot]'", markup=False)
    console.print("Wrote", *written, highlight=False, soft_wrap=True)
