"""``hf-soap options``: the ``optim_args`` of an optimizer."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown


def options(
    optimizer: Annotated[str, typer.Argument(help="A name for TrainingArguments(optim=...).")] = "soap",
    markdown: Annotated[bool, typer.Option(help="Print the Markdown source.")] = False,
) -> None:
    """Print the options of an optimizer, with type, default and meaning, and its presets."""
    from hf_soap.config import options as schema
    from hf_soap.optimizers.names import ENTRIES, load_entry_points

    load_entry_points()
    if optimizer not in ENTRIES:
        match = schema.nearest(optimizer, ENTRIES)
        raise typer.BadParameter(f"unknown optimizer {optimizer!r}: {match}Names are {', '.join(ENTRIES)}.")
    config = ENTRIES[optimizer].config
    text = "\n\n".join(filter(None, (schema.option_table(config), schema.preset_table(config))))
    if markdown:
        typer.echo(text)
    else:
        Console().print(Markdown(text))
