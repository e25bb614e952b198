"""Entry point of ``hf-soap`` and ``python -m hf_soap``."""

from __future__ import annotations

import os
import sys

if (
    __name__ == "__main__"
    and not sys.flags.safe_path
    and globals() is vars(sys.modules["__main__"])  # under runpy, the first entry is that of the program around this
    and sys.path[0] == os.getcwd()  # noqa: PTH109 - there may be a pathlib too
):
    # `python -m` puts the working folder there, where what lies beside a recipe would be taken for a library.
    del sys.path[0]

from collections.abc import Callable
from importlib.util import find_spec
from typing import Annotated, Any

# Also what a command needs only at its end, after hours of training.
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


# Everything behind the program's name is the program's, --help included, but for --recipe.
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(run)
app.command()(compare)
app.command()(options)
app.command()(plan)
app.add_typer(recipe, name="recipe")


def main() -> None:
    """Parse the command line and carry it out.

    Raises:
        SystemExit: With the exit status of the command, or of the program that ``run`` started.
    """
    launches: list[Callable[[], object]] = []
    try:
        app(prog_name="hf-soap", obj=launches)
    except SystemExit as end:
        if end.code or not launches:
            raise
    # Here and not inside the command, where an EOFError of the program would read "Aborted!".
    for launch in launches:
        try:
            launch()
        except SystemExit as end:
            if end.code:
                raise
        _leave_process_group()


def _leave_process_group() -> None:
    """Ends the communication that a program left open: gloo's threads sometimes abort a process that exits in it."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
