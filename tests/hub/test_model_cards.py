"""Cards and recipes in model_cards: they agree with each other, and their commands run."""

import math
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import measure_recipe
import pytest
from huggingface_hub import ModelCard
from paths import ROOT

from hf_soap.hub import exchange, recipes

CARDS = ROOT / "model_cards"

RECIPES = {path.stem: exchange.load(str(path)) for path in sorted(CARDS.glob("*.yaml"))}
ORDER = [
    "digits-vit",
    "small-encoder",
    "small-lm-frontier",
    "small-lm-pretraining",
    "small-lm-fine-tuning",
    "small-lm-lora",
]
"""The last two start from what the one before them leaves."""

each_recipe = pytest.mark.parametrize("name", RECIPES)


def card_of(name: str) -> str:
    return (CARDS / f"{name}.md").read_text()


def command(name: str) -> str:
    program = RECIPES[name]["provenance"]["program"]
    return f"hf-soap run scripts/{program} --recipe model_cards/{name}.yaml --output_dir outputs/{name}"


def test_every_card_has_a_recipe() -> None:
    assert sorted(RECIPES) == sorted(ORDER) == sorted(p.stem for p in CARDS.glob("*.md") if p.stem != "README")


@each_recipe
def test_recipes_are_valid(name: str) -> None:
    recipes.check(RECIPES[name], source=name)


@each_recipe
def test_cards_name_their_commands(name: str) -> None:
    """The command of the recipe, the one that measured, and those of what it starts from."""
    card = card_of(name)
    assert command(name) in card
    program = RECIPES[name]["provenance"]["program"]
    assert f"python scripts/measure_recipe.py scripts/{program} model_cards/{name}.yaml" in card
    assert f"({name}.png)" in card
    assert (CARDS / f"{name}.png").stat().st_size < 100_000
    if needed := RECIPES[name].get("model_name_or_path"):
        assert command(Path(needed).name) in card
    measuring = card[card.index("measure_recipe.py") :].partition("```")[0]
    for optim, rates in re.findall(r"--lr (\w+)=(\S+)", measuring):
        row = next(each for each in RECIPES[name]["provenance"]["results"] if each["optim"] == optim)
        tried = {*map(float, row["eval_loss_at_other_rates"]), row["learning_rate"]}
        assert tried == {*map(float, rates.split(","))}


@each_recipe
def test_cards_hold_the_results_of_their_recipe(name: str) -> None:
    assert measure_recipe.filled(card_of(name), RECIPES[name]) == card_of(name)


@each_recipe
def test_tables_say_what_the_recipe_says(name: str) -> None:
    """Read without the code that wrote them."""
    results = {each["optim"]: each for each in RECIPES[name]["provenance"]["results"]}
    head, *rows = re.findall(r"^\| (.*) \|$", card_of(name).partition("<!-- results -->")[2], re.MULTILINE)
    keys = {"held-out loss": "eval_loss", "accuracy": "eval_accuracy", "perplexity": "eval_perplexity"}
    assert len(rows) >= len(results)
    for row in rows[: len(results)]:
        cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
        want = results.pop(cells["optimizer"].strip("`"))
        for title in keys.keys() & cells.keys():
            assert [*map(float, cells[title].split(", "))] == pytest.approx(want[keys[title]], abs=6e-3)
        assert float(cells["learning rate"]) == want["learning_rate"]
        assert int(cells["steps"]) == want["steps"] == RECIPES[name]["max_steps"]
        assert float(cells["CPU seconds"]) == want["cpu_seconds"]
        assert float(cells["state bytes / parameter"]) == want["state_bytes_per_parameter"]
        assert float(cells["in `optimizer.step`"].split()[0]) == pytest.approx(100 * want["optimizer_share"], abs=0.51)
    assert not results


@each_recipe
def test_every_optimizer_has_its_best_rate_inside_what_was_tried(name: str) -> None:
    for each in RECIPES[name]["provenance"]["results"]:
        others = {float(rate): loss for rate, loss in each["eval_loss_at_other_rates"].items()}
        assert min(others) < each["learning_rate"] < max(others), each["optim"]
        assert min(others.values()) >= each["eval_loss"][0], each["optim"]
        rates = sorted([*others, each["learning_rate"]])
        assert [high / low for low, high in pairwise(rates)] == pytest.approx([2] * len(others))


def test_the_documentation_shows_the_losses_of_the_cards() -> None:
    section = (ROOT / "docs" / "recipes.md").read_text().partition("## Cards")[2]
    head = re.findall(r"`(\w+)`", section.partition("| card |")[2].partition("\n")[0])
    rows = re.findall(r"^\| \[.*\]\(\.\./model_cards/(.*)\.md\) \| (.*) \|$", section, re.MULTILINE)
    assert {name for name, _ in rows} == RECIPES.keys()
    for name, cells in rows:
        results = RECIPES[name]["provenance"]["results"]
        losses = {each["optim"]: each["eval_loss"][0] for each in results if ":" not in each["optim"]}
        shown = {optim: float(cell) for optim, cell in zip(head, cells.split(" | "), strict=True) if cell != "-"}
        assert shown == pytest.approx(losses, abs=6e-4)


def own_results(name: str) -> dict[str, Any]:
    recipe = RECIPES[name]
    (own,) = (each for each in recipe["provenance"]["results"] if each["optim"] == recipe["optim"])
    assert own["learning_rate"] == recipe["learning_rate"]
    assert own["seeds"][0] == recipe["seed"]
    return own


@each_recipe
def test_metadata_are_those_of_the_recipe_itself(name: str) -> None:
    own = own_results(name)
    data = ModelCard.load(CARDS / f"{name}.md").data
    assert data.model_name == name
    assert data.eval_results
    for result in data.eval_results:
        assert result.metric_value == own[f"eval_{result.metric_type}"][0]
        assert result.task_type == data.pipeline_tag


# ---------------------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------------------


def run(name: str, folder: Path, *options: str) -> dict[str, float]:
    """Runs the command of a card in a folder that holds what a clone does."""
    for part in ("scripts", "model_cards"):
        if not (folder / part).exists():
            (folder / part).symlink_to(ROOT / part)
    program = [sys.executable, "-m", "hf_soap", *command(name).split()[1:], *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, check=False, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    output = folder / "outputs" / name
    given = recipes.from_arguments(options).keys() | {recipes.PROVENANCE}
    ran = exchange.load(str(output))
    assert {key: ran[key] for key in RECIPES[name] if key not in given} == {
        key: value for key, value in RECIPES[name].items() if key not in given
    }
    found: dict[str, float] = measure_recipe.Run("", 0.0, 0, output).measured()
    return found


def test_commands_start(tmp_path: Path) -> None:
    """Two of them, on less text; the slow test runs all in full."""
    for name in ("small-lm-pretraining", "small-lm-lora"):
        metrics = run(name, tmp_path, "--max_steps=2", "--eval_strategy=epoch", "--train_files=stdlib:argparse.py")
        assert 5 < metrics["eval_loss"] < math.log(1024) + 0.5


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clone")


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDER)
def test_commands_give_what_the_card_says(clone: Path, name: str) -> None:
    """Other versions of Python and of its packages are other texts, other processors round in other ways."""
    own = own_results(name)
    if (needed := RECIPES[name].get("model_name_or_path")) and not (clone / needed).exists():
        run(Path(needed).name, clone)
    assert run(name, clone)["eval_loss"] == pytest.approx(own["eval_loss"][0], rel=0.1)
