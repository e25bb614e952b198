"""``hf-soap compare``: the same small language model, trained once or more per optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_soap.cli.compare.contenders import (
    DEFAULT_BETA2,
    DEFAULT_LR,
    Contender,
    per_contender,
    positive_int,
    read_contenders,
    read_schedule,
    read_seeds,
    whole_numbers,
)
from hf_soap.optimizers.names import ENTRIES

if TYPE_CHECKING:
    from hf_soap.cli.compare.corpus import Corpus
    from hf_soap.cli.compare.results import RunSettings
    from hf_soap.cli.compare.sweep import Case

DEFAULT_STEPS = 120

SWEEP = "Sweeps, horizons and seeds"
TRAINING = "Training"
MODEL = "Model and text"


def compare(
    optimizers: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME[:OPTION=VALUE,...]",
            help="Optimizer names of the Trainer, with optim_args; adamw is adamw_torch_fused.",
            show_default="adamw soap",
        ),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(help="Folder for the reports, the log of runs, and one checkpoint per optimizer.")
    ] = Path("compare"),
    html: Annotated[
        Path | None, typer.Option(help="Write a page with curves and tables to this file; it opens offline.")
    ] = None,
    lr_sweep: Annotated[
        int,
        typer.Option(min=1, help="Learning rates to try, in factors of two around --lr.", rich_help_panel=SWEEP),
    ] = 1,
    widen: Annotated[
        bool, typer.Option("--widen", help="Extend the sweep while the best is at its edge.", rich_help_panel=SWEEP)
    ] = False,
    horizons: Annotated[
        str | None,
        typer.Option(help="Lengths of runs, N,N,...: each optimizer at each length.", rich_help_panel=SWEEP),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Number of seeds, counted from 0, or a list: N,N,...", rich_help_panel=SWEEP)
    ] = "1",
    steps: Annotated[
        list[str] | None,
        typer.Option(help="N for all, NAME=N for one.", show_default=str(DEFAULT_STEPS), rich_help_panel=TRAINING),
    ] = None,
    lr: Annotated[
        list[str] | None,
        typer.Option(
            help="Peak learning rate: LR for all, NAME=LR for one.",
            show_default="tuned, if known",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    adam_beta1: Annotated[
        list[str] | None,
        typer.Option(
            help="The Trainer's adam_beta1: BETA1 for all, NAME=BETA1 for one.",
            show_default="0.9",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    adam_beta2: Annotated[
        list[str] | None,
        typer.Option(
            help="The Trainer's adam_beta2: BETA2 for all, NAME=BETA2 for one.",
            show_default="adamw=0.95",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step.", rich_help_panel=TRAINING)] = 64,
    schedule: Annotated[
        str,
        typer.Option(
            help="A learning rate schedule of the Trainer, NAME or NAME:OPTION=VALUE,...", rich_help_panel=TRAINING
        ),
    ] = "cosine",
    warmup: Annotated[
        float, typer.Option(min=0, max=1, help="Warmup, as a fraction of the steps.", rich_help_panel=TRAINING)
    ] = 0.1,
    weight_decay: Annotated[
        float, typer.Option(min=0, help="Decoupled weight decay.", rich_help_panel=TRAINING)
    ] = 0.01,
    max_grad_norm: Annotated[
        float, typer.Option(min=0, help="Clip gradients to this norm; 0 does not clip.", rich_help_panel=TRAINING)
    ] = 1.0,
    eval_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps between evaluations.",
            show_default="a twelfth of the steps",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A text file or a folder of them.",
            show_default="the sources of Python's standard library",
            rich_help_panel=MODEL,
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence.", rich_help_panel=MODEL)] = 64,
    model: Annotated[
        str,
        typer.Option(
            help="A folder or name of a model to fine-tune, with its tokenizer; needs --lr.",
            show_default="a new GPT-2 of these sizes",
            rich_help_panel=MODEL,
        ),
    ] = "",
    lora_r: Annotated[
        int, typer.Option(min=0, help="Rank of LoRA on all linear layers; 0 is none.", rich_help_panel=MODEL)
    ] = 0,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.", rich_help_panel=MODEL)] = 4,
    width: Annotated[int, typer.Option(min=1, help="Size of the hidden states.", rich_help_panel=MODEL)] = 128,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.", rich_help_panel=MODEL)] = 4,
    vocab_size: Annotated[
        int, typer.Option(min=256, help="Tokens of the BPE; 256 is raw bytes.", rich_help_panel=MODEL)
    ] = 1024,
) -> None:
    """Train the same small model with each optimizer and compare loss, steps, time and memory.

    Weights, data and data order are the same for all. An optimizer may be compared with itself under other options:
    `hf-soap compare soap soap:one_sided=true`.

    Every finished run is appended to `runs.jsonl` in the output folder. Repeating the command, after a crash or with
    more optimizers, rates or seeds, reads these runs and only makes the missing ones.

    The first optimizer is the reference. "steps to" is the number of steps until an optimizer's held-out loss reaches
    the final loss of the first one. Within one run this is only a hint, and may be too high or too low: the learning
    rate has not decayed at that step, and a run of that length would have warmed up faster. `--horizons` makes runs of
    several lengths, each with a complete schedule, and shows how long a run must be for the same loss.

    Further seeds run at the learning rate that was best for the first seed. Wall time is the time of the training
    steps, without evaluations and checkpoints, on this machine and under its present load.
    """
    from transformers.utils import logging

    from hf_soap.cli.compare.results import RunSettings
    from hf_soap.cli.compare.running import run_cases

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(markup=False, emoji=False)  # options of an optimizer may contain brackets
    if horizons and steps:
        raise typer.BadParameter("got --horizons and --steps, wanted one of them; the horizons are numbers of steps")
    if widen and lr_sweep == 1:
        raise typer.BadParameter("got --widen without a sweep; add --lr-sweep 3")
    read_schedule(schedule)
    contenders = read_contenders(optimizers or ["adamw", "soap"])
    steps_of = per_contender("--steps", steps or [], contenders, positive_int)
    lr_of = _learning_rates(lr or [], contenders, tuned=not model)
    beta1_of = per_contender("--adam-beta1", adam_beta1 or [], contenders, float)
    beta2_of = {c.label: DEFAULT_BETA2.get(c.optimizer, 0.999) for c in contenders}
    beta2_of |= per_contender("--adam-beta2", adam_beta2 or [], contenders, float)
    lengths = sorted(whole_numbers("--horizons", horizons, positive_int)) if horizons else None
    seed_list = read_seeds(seeds)
    bases = [
        RunSettings(
            optimizer=contender.optimizer,
            optim_args=contender.optim_args,
            lr=lr_of[contender.label],
            adam_beta1=beta1_of.get(contender.label, 0.9),
            adam_beta2=beta2_of[contender.label],
            steps=length,
            batch_size=batch_size,
            model=model,
            lora_r=lora_r,
            layers=layers,
            width=width,
            heads=heads,
            schedule=schedule,
            warmup=warmup,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            eval_every=eval_every or max(1, length // 12),
            seed=seed_list[0],
        )
        for contender in contenders
        for length in lengths or [steps_of.get(contender.label, DEFAULT_STEPS)]
    ]
    corpus = _read_corpus(console, data, model, bases, vocab_size=vocab_size, seq_len=seq_len)
    cases = run_cases(bases, corpus, output_dir, console, rates=lr_sweep, widen=widen, seeds=seed_list)
    _report(console, output_dir, html, cases, corpus)


def _learning_rates(given: list[str], contenders: list[Contender], *, tuned: bool) -> dict[str, float]:
    found = {c.label: DEFAULT_LR[c.optimizer] for c in contenders if tuned and c.optimizer in DEFAULT_LR}
    found |= per_contender("--lr", given, contenders, float)
    if missing := [c.optimizer for c in contenders if c.label not in found]:
        name = missing[0]
        start = ENTRIES[name].config.lr if tuned and name in ENTRIES else 1e-3
        shown = f"{start:.0e}".replace("e-0", "e-")
        raise typer.BadParameter(f"no tuned learning rate is known for {name}; give one: --lr {name}={shown}")
    return found


def _read_corpus(console: Console, data: Path | None, model: str, bases: list[RunSettings], **sizes: Any) -> Corpus:
    from hf_soap.cli.compare.corpus import build_corpus, load_tokenizer
    from hf_soap.cli.compare.training import check_settings

    try:
        with console.status("Reading and tokenising text"):
            tokenizer = load_tokenizer(model) if model else None
            corpus = build_corpus(data, **sizes, max_held_out=256, tokenizer=tokenizer)
        for base in bases:
            check_settings(base, corpus)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(corpus.source, highlight=False)
    return corpus


def _report(console: Console, output_dir: Path, html: Path | None, cases: list[Case], corpus: Corpus) -> None:
    from hf_soap.cli.compare import page, report
    from hf_soap.cli.compare.summary import equal_loss, summarize

    rows = summarize(cases)
    equal = equal_loss(cases) if len(rows) > len({row.optimizer for row in rows}) else []
    console.print(report.render(rows))
    if equal:
        console.print(report.render_equal_loss(equal))
    for row in rows:
        if row.lr_edge:
            console.print(
                f"{row.optimizer}: the best learning rate, {row.lr:g}, is the {row.lr_edge} tried at {row.steps} "
                "steps, and a better one may lie beyond; use --widen to extend the sweep",
                highlight=False,
            )
    for row in rows:
        if Path(row.checkpoint).exists():
            console.print(f"{row.optimizer}: {row.checkpoint}", highlight=False, soft_wrap=True)
    report.write_json(output_dir / "compare.json", cases, corpus)
    (output_dir / "compare.md").write_text(report.markdown(rows, equal), encoding="utf-8")
    written = [output_dir / "compare.json", output_dir / "compare.md"]
    if html is not None:
        page.write_html(html, cases, corpus)
        written.append(html)
    try:
        report.plot(output_dir / "compare.png", cases)
        written.append(output_dir / "compare.png")
    except ImportError:
        console.print("No plot, because matplotlib is not installed: pip install 'hf-soap[plot]'", markup=False)
    console.print("Wrote", *written, highlight=False, soft_wrap=True)
