"""``hf-soap plan``: memory and work of a training run, without allocating anything."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from hf_soap.planning import Report, Row
    from hf_soap.schema import OptimizerConfig

GIB = 2**30


def plan(
    model: Annotated[str, typer.Argument(help="A config.json, a folder with one, or the name of a model on the Hub.")],
    optim: Annotated[str, typer.Option(help="A name for TrainingArguments(optim=...).")] = "soap",
    optim_args: Annotated[str, typer.Option(help="As TrainingArguments(optim_args=...) takes them.")] = "",
    fsdp: Annotated[int, typer.Option(min=1, help="Ranks over which FSDP2 shards the model.")] = 1,
    ddp: Annotated[int, typer.Option(min=1, help="Ranks with the whole model each.")] = 1,
    shard_mode: Annotated[Literal["local", "owner"] | None, typer.Option(help="In place of the option's.")] = None,
    lora_r: Annotated[int | None, typer.Option(min=1, help="Train LoRA adapters of this rank.")] = None,
    lora_targets: Annotated[
        str | None, typer.Option(help="Layers with adapters: a regex, or all-linear.", show_default="peft's choice")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a step, of all ranks together.")] = 500_000,
    gpu_memory: Annotated[
        float | None, typer.Option(min=0, help="GiB on each rank: suggests settings if this is too little.")
    ] = None,
    max_overhead: Annotated[
        float | None, typer.Option(min=0, help="Percent of forward and backward: suggests settings if it takes more.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32 also for bf16=True.")] = "float32",
    model_class: Annotated[
        str | None, typer.Option(help="A class of transformers.", show_default="what the config names")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Say what an optimizer will do to each tensor of a model, and what memory and work that takes.

    Nothing is allocated and no weights are read. Activations and buffers of communication are not counted.
    """
    from transformers.utils import logging

    from hf_soap import planning
    from hf_soap.cli.blueprint import model_without_weights, trainer_groups

    logging.set_verbosity_error()
    if fsdp > 1 and ddp > 1:
        raise typer.BadParameter("got --fsdp and --ddp, wanted one of them")
    config = _config(optim, optim_args, shard_mode)
    built = model_without_weights(
        model, model_class=model_class, dtype=dtype, lora_r=lora_r, lora_targets=lora_targets
    )
    run = planning.Run(built, trainer_groups(built), max(fsdp, ddp), sharded=fsdp > 1, tokens=batch_tokens)
    memory = None if gpu_memory is None else gpu_memory * GIB
    try:
        report = planning.report(run, config, memory=memory, overhead=max_overhead and max_overhead / 100)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        _show(Console(markup=False, emoji=False), report, memory)


def _config(optim: str, optim_args: str, shard_mode: str | None) -> OptimizerConfig:
    from hf_soap import registry, schema

    if optim not in registry.ENTRIES:
        match = schema.nearest(optim, registry.ENTRIES)
        raise typer.BadParameter(f"unknown optimizer {optim!r}: {match}Names are {', '.join(registry.ENTRIES)}.")
    try:
        config = schema.parse_optim_args(optim_args, registry.ENTRIES[optim].config)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return config if shard_mode is None else replace(config, shard_mode=shard_mode)  # type: ignore[call-arg]


PLACES = {
    "local": "FSDP2, each rank its part of a matrix (shard_mode=local)",
    "owner": "FSDP2, whole matrices on one rank each (shard_mode=owner)",
    "ddp": "DDP",
    "ddp, owner": "DDP, whole matrices on one rank each (shard_mode=owner)",
}


def _show(console: Console, report: Report, memory: float | None) -> None:
    where = f"{report.ranks} ranks: {PLACES[report.mode]}" if report.ranks > 1 else "one process"
    trained = "" if report.trained == report.parameters else f", {report.trained:,} of them trained"
    options = f" with {report.asked.optim_args}" if report.asked.optim_args else ""
    console.print(f"{report.model}, {report.parameters:,} parameters{trained}; {report.optim}{options}; {where}")
    console.print(_routing(report.tensors, owners="owner" in report.mode and report.ranks > 1))
    console.print(_figures(report, memory))
    if report.fits is False:
        console.print(_suggestions(report))


def _routing(rows: list[Row], *, owners: bool) -> Table:
    names = ("tensors", "shape", "rule", "factors of", "decay", "factors", "state")
    caption = "state of tensors by owner is that of all owners together, other state that of each rank"
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
    table = Table("of each rank, at most", "")
    table.columns[1].justify = "right"
    table.add_row("weights", _size(report.weights))
    table.add_row("gradients", _size(report.gradients))
    table.add_row("optimizer: factors, bases, roots", _size(cost.factors))
    table.add_row("optimizer: other state", _size(cost.state - cost.factors))
    table.add_row("optimizer: temporaries of a step, about", _size(cost.temporaries))
    table.add_row("together", _size(asked.memory))
    if memory is not None:
        table.add_row("left for activations", _size(memory - asked.memory))
    table.add_row("sent by the optimizer in a step", _size(cost.sent), end_section=True)
    table.add_row("preconditioning, a step", f"{cost.work / 1e12:,.2f} TFLOP")
    table.add_row(f"forward and backward of {report.tokens:,} tokens", f"{report.model_work / 1e12:,.2f} TFLOP")
    table.add_row("overhead", f"{asked.overhead:.1%}")
    return table


def _suggestions(report: Report) -> Table | str:
    if not report.suggestions:
        return (
            "This does not fit, nor does any setting that was tried. Use more ranks under FSDP2 (--fsdp), LoRA "
            "(--lora-r) or bfloat16 weights (--dtype)."
        )
    table = Table("optim_args", "state", "together", "overhead", title="This does not fit; these settings do")
    table.columns[0].overflow = "fold"
    for found in report.suggestions:
        table.add_row(found.optim_args, _size(found.cost.state), _size(found.memory), f"{found.overhead:.1%}")
    return table


def _size(octets: float) -> str:
    return f"{octets / GIB:,.2f} GiB" if abs(octets) >= GIB / 10 else f"{octets / 2**20:,.2f} MiB"
