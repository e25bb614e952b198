"""``hf-soap run``: starts an unmodified program with the optimizers registered."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shlex
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated

import typer

from hf_soap.cli import launched
from hf_soap.cli.recipe import refusals
from hf_soap.hub import exchange, recipes

CHILDREN = Path(__file__).parent / "children"
"""Folder of the sitecustomize.py that registers the optimizers in the Python processes that a program starts."""

Launch = Callable[[], object]


def run(
    ctx: typer.Context,
    program: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT.py|COMMAND|-m MODULE [ARGS]", show_default=False),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(help="A file, or a repository on the Hub; none leaves a later --recipe to the program."),
    ] = None,
    allow_key: Annotated[
        list[str] | None, typer.Option(help="A key of the recipe to accept, which is an option of your script.")
    ] = None,
) -> None:
    """Run an unmodified training program to which soap, shampoo and mars are available as optimizers.

    SCRIPT.py is a file, COMMAND is an installed Python command, and MODULE is a module for `python -m`. The program
    gets all further arguments unchanged, except --recipe: the keys of the recipe become options of the program. Your
    own options override them. The optimizers are also available in Python processes that the program starts.

    ```
    hf-soap run run_clm.py --optim soap ...
    hf-soap run trl sft --optim soap ...
    hf-soap run -m trl.scripts.sft --optim soap ...
    torchrun --nproc_per_node 2 -m hf_soap run run_clm.py --optim soap ...
    accelerate launch -m hf_soap run run_clm.py --optim soap ...
    hf-soap run scripts/run_clm.py --recipe user/model --learning_rate 1e-3
    ```
    """
    launch = prepare(with_recipe(program, recipe, allow_key or ()))
    launched.start(sys.argv, module=program[0] == "-m")
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
            raise typer.BadParameter("got -m alone, wanted a module after it; for example -m trl.scripts.sft")
        return _prepare_module(*arguments)
    if name.startswith("-"):
        raise typer.BadParameter(
            f"got the option {name} before the program, wanted a script, a command or -m MODULE first; "
            "options of the program go after its name"
        )
    sys.argv = program
    # Before files: `trl sft` does not start a file of that name in the working folder either.
    if command := _installed_command(name):
        return partial(_run_command, command)
    if Path(name).exists():
        _put_on_path(Path(name).resolve().parent)
        return partial(runpy.run_path, name, run_name="__main__")
    raise typer.BadParameter(
        f"got {name!r}, wanted an existing script or an installed Python command; "
        f"check the path (the working folder is {Path.cwd()}), or use -m for a module"
    )


def with_recipe(program: list[str], source: str | None, allowed: Iterable[str]) -> list[str]:
    """Insert the keys of a recipe before the program's options.

    Args:
        program: See :func:`prepare`; ``--recipe`` may be among the arguments, up to a bare ``--``.
        source: A recipe that was named before the program; ``none`` leaves every ``--recipe`` to the program.
        allowed: Keys to accept that only the program knows.

    Returns:
        The program, its leading positional arguments, the options of the recipe that the command line does not set,
        and the remaining arguments.

    Raises:
        typer.BadParameter: If the recipe cannot be read or is refused, or if there are two.
    """
    head = 2 if program[0] == "-m" else 1
    arguments = program[head:]
    if source is None:
        source, arguments = _take_recipe(arguments)
    if source in (None, "none"):
        return [*program[:head], *arguments]
    with refusals():
        recipe = exchange.load(source)
        recipes.check(recipe, source=source, allowed=allowed)
    given = recipes.from_arguments(arguments)
    used = {key: value for key, value in recipe.items() if not {key, f"no_{key}"} & given.keys()}
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"{source}: {shlex.join(recipes.to_arguments(used))}", err=True)
        for key in [key for key in recipe if key not in used]:
            typer.echo(f"{source}: {key} is {given.get(key, False)!r} instead of {recipe[key]!r}", err=True)
    positional = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    return [*program[:head], *arguments[:positional], *recipes.to_arguments(used), *arguments[positional:]]


def _take_recipe(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Removes ``--recipe SOURCE`` or ``--recipe=SOURCE`` from a program's arguments, and returns both."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    places = [i for i in range(end) if arguments[i] == "--recipe" or arguments[i].startswith("--recipe=")]
    if not places:
        return None, arguments
    first, *more = places
    _, equals, source = arguments[first].partition("=")
    after = first + 1
    if not equals and after < end:
        source, after = arguments[after], after + 1
    if more or not source or source.startswith("-"):
        raise typer.BadParameter(
            f"got {'--recipe twice' if more else '--recipe alone'}, wanted one file or repository after it; "
            "if it is an option of the program, put --recipe none before the program"
        )
    return source, arguments[:first] + arguments[after:]


def _prepare_module(name: str, *arguments: str) -> Launch:
    sys.argv = [name, *arguments]
    _put_on_path(Path.cwd())
    if _is_runnable(name):
        return partial(runpy.run_module, name, run_name="__main__", alter_sys=True)
    # TRL has no __main__; its command line is a console script of the same name.
    if command := _installed_command(name):
        return partial(_run_command, command)
    raise typer.BadParameter(
        f"got -m {name}, wanted a module, or a package with a __main__, that this Python can import; "
        f"check the spelling, or install it into {sys.prefix}"
    )


def _put_on_path(folder: Path) -> None:
    """Puts a folder first on the path, as Python does for a script or a module unless in safe-path mode."""
    if not sys.flags.safe_path:
        sys.path.insert(0, str(folder))


def _is_runnable(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return False
        # The parent package exists, but one of its imports does not: this error is the one to show.
        raise
    return spec is not None


def _installed_command(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group="console_scripts", name=name)), None)


def _run_command(command: EntryPoint) -> None:
    sys.exit(command.load()())


def _register_in_children() -> None:
    # Launchers such as accelerate's, which TRL's command line uses, train in separate processes.
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{CHILDREN}{os.pathsep}{inherited}" if inherited else str(CHILDREN)
