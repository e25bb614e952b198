"""``hf-soap plan``: memory and work of a training run, without allocating anything."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from hf_soap.planning.plan import ADAMW, BATCHES

if TYPE_CHECKING:
    from hf_soap.config.options import OptimizerConfig
    from hf_soap.planning.plan import AdamW, Report, Row

GIB = 2**30


def plan(
    model: Annotated[str, typer.Argument(help="A config.json, a folder with one, or the name of a model on the Hub.")],
    optim: Annotated[
        str, typer.Option(help="A name for TrainingArguments(optim=...): one of ours, or adamw_torch(_fused).")
    ] = "soap",
    optim_args: Annotated[str, typer.Option(help="Options, as for TrainingArguments(optim_args=...).")] = "",
    fsdp: Annotated[int, typer.Option(min=1, help="Ranks over which FSDP2 shards the model.")] = 1,
    ddp: Annotated[int, typer.Option(min=1, help="Ranks that each hold the whole model.")] = 1,
    shard_mode: Annotated[
        Literal["local", "owner"] | None, typer.Option(help="Overrides the option of that name.")
    ] = None,
    lora_r: Annotated[int | None, typer.Option(min=1, help="Train LoRA adapters of this rank.")] = None,
    lora_targets: Annotated[
        str | None, typer.Option(help="Layers with adapters: a regex, or all-linear.", show_default="peft's default")
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens in a step, over all ranks; count patches or frames if there is no text. Shows the overhead "
            "at this number only.",
            show_default=f"{', '.join(map(str, BATCHES))}; limits apply to the second",
        ),
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=0, help="GiB on each rank. Suggests settings if this is not enough.")
    ] = None,
    max_overhead: Annotated[
        float | None,
        typer.Option(min=0, help="Percent of forward and backward. Suggests settings if preconditioning takes more."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: float32 also for bf16=True.")] = "float32",
    model_class: Annotated[
        str | None,
        typer.Option(help="A class of transformers.", show_default="the class in the config, or one by its type"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show how an optimizer treats each tensor of a model, and the memory and work it needs compared with AdamW.

    The more tokens there are in a step, the smaller is the overhead of preconditioning. It is shown for several.
    Nothing is allocated and no weights are read. Activations and communication buffers are not counted.
    """
    from transformers.utils import logging

    from hf_soap.cli.meta_model import model_without_weights, trainer_groups
    from hf_soap.planning import plan as planning

    logging.set_verbosity_error()
    if fsdp > 1 and ddp > 1:
        raise typer.BadParameter("got --fsdp and --ddp, wanted one of them")
    config = _config(optim, optim_args, shard_mode)
    built, chosen = model_without_weights(
        model, model_class=model_class, dtype=dtype, lora_r=lora_r, lora_targets=lora_targets
    )
    tokens, batches = (BATCHES[1], BATCHES) if batch_tokens is None else (batch_tokens, (batch_tokens,))
    run = planning.Run(built, trainer_groups(built), max(fsdp, ddp), sharded=fsdp > 1, tokens=tokens)
    memory = None if gpu_memory is None else gpu_memory * GIB
    share = None if max_overhead is None else max_overhead / 100
    try:
        report = planning.report(run, config, memory=memory, overhead=share, batches=batches)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        typer.echo(json.dumps({"chosen": chosen, **asdict(report)}, indent=2))
    else:
        _show(Console(markup=False, emoji=False), report, memory, chosen)


def _config(optim: str, optim_args: str, shard_mode: str | None) -> OptimizerConfig | AdamW:
    from hf_soap.config import options
    from hf_soap.optimizers.names import ENTRIES, load_entry_points
    from hf_soap.planning import plan as planning

    load_entry_points()
    if optim in planning.ADAMW:
        if optim_args or shard_mode:
            raise typer.BadParameter(
                f"got options for {optim}, wanted none: --optim-args and --shard-mode are for our optimizers"
            )
        return planning.AdamW(optim)
    if optim not in ENTRIES:
        names = (*ENTRIES, *planning.ADAMW)
        raise typer.BadParameter(
            f"unknown optimizer {optim!r}: {options.nearest(optim, names)}Names are {', '.join(names)}."
        )
    try:
        config = options.parse_optim_args(optim_args, ENTRIES[optim].config)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return config if shard_mode is None else replace(config, shard_mode=shard_mode)  # type: ignore[call-arg]


PLACES = {
    "local": "FSDP2, each rank its part of a matrix (shard_mode=local)",
    "owner": "FSDP2, whole matrices on one rank each (shard_mode=owner)",
    "ddp": "DDP",
    "ddp, owner": "DDP, whole matrices on one rank each (shard_mode=owner)",
}


def _show(console: Console, report: Report, memory: float | None, chosen: str) -> None:
    place = PLACES[report.mode].split(",")[0] if report.optim in ADAMW else PLACES[report.mode]
    where = f"{report.ranks} ranks: {place}" if report.ranks > 1 else "one process"
    trained = "" if report.trained == report.parameters else f", {report.trained:,} of them trained"
    given = f" with {report.asked.optim_args}" if report.asked.optim_args else ""
    console.print(f"{report.model}, {report.parameters:,} parameters{trained}; {report.optim}{given}; {where}")
    if chosen:
        console.print(f"{report.model} was chosen {chosen}")
    console.print(_routing(report.tensors, owners="owner" in report.mode and report.ranks > 1))
    console.print(_figures(report, memory))
    console.print(_compared_with_adamw(report))
    console.print(_work(report))
    if report.fits is False:
        console.print(_suggestions(report))


def _routing(rows: list[Row], *, owners: bool) -> Table:
    names = ("tensors", "shape", "rule", "factors of", "decay", "factors", "state")
    caption = "the state of tensors with owners is the total over ranks; other state is that of each rank"
    table = Table(*names, caption=caption if owners else None)
    table.columns[0].overflow = "fold"
    for column in table.columns[4:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.example + (f" × {row.tensors}" if row.tensors > 1 else ""),
            " × ".join(map(str, row.shape)),
            row.rule,
            ", ".join(map(str, row.sides)),
            "yes" if row.decays else "no",
            _size(row.factors),
            _size(row.state),
        )
    return table


def _figures(report: Report, memory: float | None) -> Table:
    asked, cost = report.asked, report.asked.cost
    table = Table("on each rank, at most", "")
    table.columns[1].justify = "right"
    table.add_row("weights", _size(report.weights))
    table.add_row("gradients", _size(report.gradients))
    table.add_row("optimizer: factors, bases, roots", _size(cost.factors))
    table.add_row("optimizer: other state", _size(cost.state - cost.factors))
    table.add_row("optimizer: temporaries of a step, estimated", _size(cost.temporaries))
    table.add_row("total", _size(asked.memory))
    if memory is not None:
        table.add_row("left for activations", _size(memory - asked.memory))
    table.add_row("sent by the optimizer in a step", _size(cost.sent))
    return table


def _compared_with_adamw(report: Report) -> Table:
    rows = {report.optim: report.asked}
    if report.optim not in ADAMW:
        rows[f"AdamW ({ADAMW[0]})"] = report.adamw
    table = Table("optimizer", "state", "temporaries", "total")
    for name, setting in rows.items():
        table.add_row(name, _size(setting.cost.state), _size(setting.cost.temporaries), _size(setting.memory))
    return _right(table)


def _work(report: Report) -> Table:
    table = Table("tokens in a step, over all ranks", "forward and backward", "preconditioning", "overhead")
    for batch in report.batches:
        work = f"{report.asked.cost.work / 1e12:,.2f} TFLOP"
        table.add_row(f"{batch.tokens:,}", f"{batch.model_work / 1e12:,.2f} TFLOP", work, f"{batch.overhead:.1%}")
    if report.early_updates:
        table.caption = (
            f"preconditioning after the first {report.early_updates} updates, in which there are "
            f"{report.early_refreshes} refreshes of each basis"
        )
    return _right(table)


def _right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _suggestions(report: Report) -> Table | str:
    if not report.suggestions:
        return (
            "This does not fit, and no setting that was tried does. Use more ranks under FSDP2 (--fsdp), LoRA "
            "(--lora-r) or bfloat16 weights (--dtype)."
        )
    overhead = f"overhead at {report.tokens:,} tokens"
    table = Table("optim_args", "state", "total", overhead, title="This does not fit; these settings do")
    table.columns[0].overflow = "fold"
    for found in report.suggestions:
        table.add_row(found.optim_args, _size(found.cost.state), _size(found.memory), f"{found.overhead:.1%}")
    return table


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f} GiB" if abs(num_bytes) >= GIB / 10 else f"{num_bytes / 2**20:,.2f} MiB"
