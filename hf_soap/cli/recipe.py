"""``hf-soap recipe``: show, validate, compare and exchange recipes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from hf_soap.hub import exchange, recipes

app = typer.Typer(
    help="Show, validate, compare and exchange recipes.", no_args_is_help=True, rich_markup_mode="markdown"
)

Source = Annotated[
    str, typer.Argument(help="A file, an output folder, or a repository on the Hub: user/name[@revision].")
]
AllowKey = Annotated[list[str] | None, typer.Option(help="A key to accept, which is an option of your script.")]


@contextmanager
def refusals() -> Iterator[None]:
    """Turn a ValueError of the library into an error of the command line."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def show(source: Source) -> None:
    """Print a recipe."""
    with refusals():
        text = recipes.dump(exchange.load(source))
    console = Console()
    if console.is_terminal:
        console.print(Syntax(text.rstrip("\n"), "yaml", background_color="default", word_wrap=True))
    else:
        typer.echo(text, nl=False)  # do not wrap lines in a file


@app.command()
def validate(source: Source, allow_key: AllowKey = None) -> None:
    """Check a recipe for unsafe content, unknown keys, wrong types and values out of range."""
    with refusals():
        recipe = exchange.load(source)
        recipes.check(recipe, source=source, allowed=allow_key or ())
    typer.echo(f"{source}: {len(recipe)} keys, all valid")


@app.command()
def diff(one: Source, other: Source) -> None:
    """Compare two recipes key by key. The exit status is 1 if they differ."""
    with refusals():
        rows = recipes.differences(exchange.load(one), exchange.load(other))
    if not rows:
        typer.echo("no difference")
        return
    table = Table("key", one, other, box=SIMPLE_HEAD, pad_edge=False)
    for key, *values in rows:
        table.add_row(Text(key), *map(_cell, values))
    Console(markup=False, emoji=False).print(table)
    raise typer.Exit(1)


@app.command()
def push(
    source: Source,
    repo: Annotated[str, typer.Argument(help="user/name; created if there is none.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Visibility of a new repository.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    allow_key: AllowKey = None,
) -> None:
    """Upload a recipe to a repository as recipe.yaml; its model card is not changed."""
    with refusals():
        recipes.check(exchange.load(source), source=source, allowed=allow_key or ())
        typer.echo(exchange.push(source, repo, private=private, message=message))


@app.command()
def pull(
    source: Source,
    folder: Annotated[Path, typer.Argument(help="The folder for recipe.yaml.")] = Path(),
    overwrite: Annotated[bool, typer.Option(help="Replace a different recipe.yaml in the folder.")] = False,
) -> None:
    """Download a recipe from a repository, or from its model card."""
    with refusals():
        typer.echo(exchange.pull(source, folder, overwrite=overwrite))


def _cell(value: Any) -> Text:
    return Text("-", style="dim") if value is None else Text(str(value))
