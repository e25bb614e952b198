"""Entry point of ``hf-soap`` and ``python -m hf_soap``."""

from __future__ import annotations

import os
import sys

if (
    __name__ == "__main__"
    and not sys.flags.safe_path
    and globals() is vars(sys.modules["__main__"])  # under runpy, the first entry belongs to the calling program
    and sys.path[0] == os.getcwd()  # noqa: PTH109 - the folder may contain a pathlib.py
):
    # `python -m` puts the working folder first on the path. Files next to a recipe would be imported as libraries.
    del sys.path[0]

from collections.abc import Callable
from importlib.util import find_spec
from typing import Annotated, Any

# Checked now, since a command needs some of these only at its end, after hours of training.
if _missing := [name for name in ("jinja2", "rich", "tokenizers", "typer") if find_spec(name) is None]:
    _command = " ".join(["hf-soap", *(word for word in sys.argv[1:2] if not word.startswith("-"))])
    sys.exit(f"{_command} needs {' and '.join(_missing)}: pip install 'hf-soap[cli]'")

import typer

from hf_soap import __version__
from hf_soap.cli.compare.command import compare
from hf_soap.cli.options import options
from hf_soap.cli.plan import plan
from hf_soap.cli.recipe import app as recipe
from hf_soap.cli.run import run

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-soap {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """SOAP, Shampoo and MARS for the Hugging Face Trainer."""


# All arguments after the program's name belong to the program, --help included; only --recipe is ours.
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(run)
app.command()(compare)
app.command()(options)
app.command()(plan)
app.add_typer(recipe, name="recipe")


def main() -> None:
    """Parse the command line and run the command.

    Raises:
        SystemExit: With the exit status of the command, or of the program that ``run`` started.
    """
    launches: list[Callable[[], object]] = []
    try:
        app(prog_name="hf-soap", obj=launches)
    except SystemExit as end:
        if end.code or not launches:
            raise
    # Not inside the command, where typer would turn an EOFError of the program into "Aborted!".
    for launch in launches:
        try:
            launch()
        except SystemExit as end:
            if end.code:
                raise
        _leave_process_group()


def _leave_process_group() -> None:
    """Ends a process group that a program left open: gloo's threads sometimes abort a process that exits with one."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
