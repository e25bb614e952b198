"""``hf-soap run``: start a program that nobody edited, with the optimizers registered."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated

import typer

CHILDREN = Path(__file__).parent / "children"
"""Holds the sitecustomize.py that registers the optimizers in the Python processes that a program starts."""

Launch = Callable[[], object]


def run(
    ctx: typer.Context,
    program: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT.py|COMMAND|-m MODULE [ARGS]", show_default=False),
    ],
) -> None:
    """Run an unedited training program with soap, shampoo and mars among the optimizers it knows.

    SCRIPT.py is a file, COMMAND an installed Python command, MODULE what `python -m` takes. What follows goes to the
    program as it stands. Python processes that the program starts know the optimizers too.

    ```
    hf-soap run run_clm.py --optim soap ...
    hf-soap run trl sft --optim soap ...
    hf-soap run -m trl.scripts.sft --optim soap ...
    torchrun --nproc_per_node 2 -m hf_soap run run_clm.py --optim soap ...
    accelerate launch -m hf_soap run run_clm.py --optim soap ...
    ```
    """
    launch = prepare(program)
    _register_in_children()
    ctx.obj.append(launch)


def prepare(program: list[str]) -> Launch:
    """Set ``sys.argv`` and ``sys.path`` as the program expects them.

    Args:
        program: A script, the name of an installed command or ``-m`` and a module, then the program's own arguments.

    Returns:
        A function that runs the program as ``__main__`` in this process.

    Raises:
        typer.BadParameter: If there is no such program.
    """
    name, *arguments = program
    if name == "-m":
        if not arguments:
            raise typer.BadParameter("got -m alone, wanted a module behind it; for example -m trl.scripts.sft")
        return _prepare_module(*arguments)
    if name.startswith("-"):
        raise typer.BadParameter(
            f"got the option {name} before the program, wanted a script, a command or -m MODULE first; "
            "options of the program go behind its name"
        )
    sys.argv = program
    if Path(name).exists():
        sys.path.insert(0, str(Path(name).resolve().parent))
        return partial(runpy.run_path, name, run_name="__main__")
    if command := _installed_command(name):
        return partial(_run_command, command)
    raise typer.BadParameter(
        f"got {name!r}, wanted an existing script or an installed Python command; "
        f"check the path (the working folder is {Path.cwd()}), or use -m for a module"
    )


def _prepare_module(name: str, *arguments: str) -> Launch:
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(Path.cwd()))
    if _is_runnable(name):
        return partial(runpy.run_module, name, run_name="__main__", alter_sys=True)
    # TRL is a package without __main__ whose command line is a console script of the same name.
    if command := _installed_command(name):
        return partial(_run_command, command)
    raise typer.BadParameter(
        f"got -m {name}, wanted a module, or a package with a __main__, that this Python can import; "
        f"check the spelling, or install it into {sys.prefix}"
    )


def _is_runnable(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return False
        # The parent package is there, but something that it imports is not: that is the message to show.
        raise
    return spec is not None


def _installed_command(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group="console_scripts", name=name)), None)


def _run_command(command: EntryPoint) -> None:
    sys.exit(command.load()())


def _register_in_children() -> None:
    # A launcher such as accelerate's, which TRL's command line goes through, trains in a process of its own.
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{CHILDREN}{os.pathsep}{inherited}" if inherited else str(CHILDREN)
