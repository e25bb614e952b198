"""Recipes on command lines: in front of a program, and as `hf-soap recipe` shows, compares and pulls them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from paths import ROOT
from recipe_texts import VALID, read
from typer.testing import CliRunner

from hf_soap.__main__ import app
from hf_soap.cli.run import CHILDREN, with_recipe
from hf_soap.config import plain_yaml
from hf_soap.hub import recipes

# ---------------------------------------------------------------------------------------------------------------------
# The launcher
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("optim: soap\nlearning_rate: 3e-3\nbf16: true\nprovenance: {program: evil.py}\n")
    return "recipe.yaml"


OPTIONS = ["--optim=soap", "--learning_rate=0.003", "--bf16"]


@pytest.mark.parametrize(
    ("program", "want"),
    [
        ("train.py --recipe recipe.yaml --seed 1", ["train.py", *OPTIONS, "--seed", "1"]),
        ("train.py --seed 1 --recipe=recipe.yaml", ["train.py", *OPTIONS, "--seed", "1"]),
        ("trl sft --recipe recipe.yaml", ["trl", "sft", *OPTIONS]),
        ("-m trl sft --recipe . --seed 1", ["-m", "trl", "sft", *OPTIONS, "--seed", "1"]),
        ("train.py --recipe recipe.yaml --learning-rate 1", ["train.py", *OPTIONS[::2], "--learning-rate", "1"]),
        ("train.py --recipe recipe.yaml --no_bf16", ["train.py", *OPTIONS[:2], "--no_bf16"]),
        ("train.py -- --recipe x", ["train.py", "--", "--recipe", "x"]),
        ("train.py --recipes x", ["train.py", "--recipes", "x"]),
    ],
)
@pytest.mark.usefixtures("recipe")
def test_a_recipe_stands_in_front_of_what_is_given(program: str, want: list[str]) -> None:
    assert with_recipe(program.split(), None, ()) == want


def test_a_recipe_may_be_named_before_the_program(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A --recipe behind it is then the program's own."""
    given = ["train.py", "--recipe", "x", "--bf16=false"]
    assert with_recipe(given, recipe, ()) == ["train.py", *OPTIONS[:2], *given[1:]]
    assert with_recipe(given, "none", ()) == given
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "recipe.yaml: --optim=soap --learning_rate=0.003\nrecipe.yaml: bf16 is 'false' instead of True\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--recipe", "got --recipe alone"),
        ("--recipe --seed", "got --recipe alone"),
        ("--recipe=", "got --recipe alone"),
        ("--recipe -- x", "got --recipe alone"),
        ("--recipe recipe.yaml --recipe recipe.yaml", "got --recipe twice"),
        ("--recipe other.yaml", "found no file other.yaml; check the path"),
        ("--recipe ./other", "found no file other"),
        ("--recipe bad.yaml", "bad.yaml is refused\n- trust_remote_code: refused"),
        ("--recipe unknown.yaml", "unknown key; did you mean seed"),
        ("--recipe a/b/c", "wanted a file, or a repository such as user/name"),
        ("--recipe user/model", "HF_HUB_OFFLINE is set"),
        ("--recipe README.md", "got a model card with 0 recipes"),
    ],
)
@pytest.mark.usefixtures("recipe")
def test_recipes_that_are_not_run(arguments: str, message: str) -> None:
    Path("bad.yaml").write_text("trust_remote_code: true")
    Path("unknown.yaml").write_text("seet: 1")
    Path("README.md").write_text("# A card")
    with pytest.raises(typer.BadParameter, match=message):
        with_recipe(["train.py", *arguments.split()], None, ())


def test_the_program_gets_the_options(recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("argv", "path"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(recipes, "LAUNCH", None)
    Path("train.py").write_text("import sys; print(sys.argv)")
    launches: list[Any] = []
    done = CliRunner().invoke(app, ["run", "train.py", "--recipe", recipe, "--my", "1"], obj=launches)
    assert done.exit_code == 0, done.output
    launches[0]()
    assert capsys.readouterr().out == f"{['train.py', *OPTIONS, '--my', '1']}\n"
    assert recipes.Launch("train.py", (*OPTIONS, "--my", "1")) == recipes.LAUNCH


def test_processes_below_the_launcher_remember_their_own_options(tmp_path: Path) -> None:
    """TRL's command line trains in a process that accelerate starts."""
    (tmp_path / "train.py").write_text("import transformers; from hf_soap.hub import recipes; print(recipes.LAUNCH)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CHILDREN), str(ROOT)])}
    command = [sys.executable, str(tmp_path / "train.py"), "--x", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=300)
    assert done.stdout == f"{recipes.Launch('train.py', ('--x', '1'))}\n"


# ---------------------------------------------------------------------------------------------------------------------
# hf-soap recipe
# ---------------------------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["recipe", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_show_and_validate(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = VALID.replace("# A comment", "---")  # which begins a document, and a card too
    path.write_text(f"{text}run_name: {'long ' * 60}\n")
    status, output = invoke("show", str(path))
    assert status == 0
    assert plain_yaml.load(output.encode()) == {**read(VALID), "run_name": ("long " * 60).strip()}
    assert invoke("validate", str(path)) == (0, f"{path}: 12 keys, all valid\n")
    path.write_text("learning_rat: 1\nbf16: 3")
    status, output = invoke("validate", str(path))
    assert status == 2
    assert "did you mean learning_rate?" in output
    assert "bf16: got 3, wanted true or false" in output
    path.write_text("mine: 1")
    assert invoke("validate", str(path), "--allow-key", "mine")[0] == 0


def test_diff(tmp_path: Path) -> None:
    for name, text in {"a": "seed: 1\nbf16: true\nprovenance: {x: {y: 1}}", "b": "bf16: true\noptim: soap"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    one, other = (str(tmp_path / f"{name}.yaml") for name in "ab")
    assert recipes.differences(read(Path(one).read_text()), read(Path(other).read_text())) == [
        ("seed", 1, None),
        ("provenance.x.y", 1, None),
        ("optim", None, "soap"),
    ]
    assert invoke("diff", one, one) == (0, "no difference\n")
    status, output = invoke("diff", one, other)
    assert status == 1
    assert [line.split() for line in output.splitlines() if "soap" in line] == [["optim", "-", "soap"]]


def test_pull_keeps_what_is_there(tmp_path: Path) -> None:
    """It takes a recipe out of a model card, and always writes recipe.yaml, whatever the source is called."""
    card = tmp_path / "README.md"
    card.write_text(f"---\nlicense: mit\n---\n\n# Mine\n\n{recipes.embed(read(VALID))}\n")
    folder = tmp_path / "new" / "folder"
    assert invoke("pull", str(card), str(folder))[0] == 0
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]
    assert read((folder / "recipe.yaml").read_text()) == read(VALID)
    assert invoke("pull", str(card), str(folder))[0] == 0
    (folder / "recipe.yaml").write_text("seed: 1")
    status, output = invoke("pull", str(card), str(folder))
    assert status == 2
    assert "which has a different recipe.yaml" in output
    assert (folder / "recipe.yaml").read_text() == "seed: 1"
    assert invoke("pull", str(card), str(folder), "--overwrite")[0] == 0
    assert read((folder / "recipe.yaml").read_text()) == read(VALID)
    card.write_text(card.read_text() + recipes.embed({"seed": 1}))
    assert "2 recipes" in invoke("pull", str(card), str(folder))[1]
