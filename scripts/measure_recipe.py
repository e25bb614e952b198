"""Runs a recipe with several optimizers and learning rates, and writes the results into the recipe and its card.

    python scripts/measure_recipe.py scripts/run_clm.py model_cards/small-lm-pretraining.yaml \
        --lr adamw_torch_fused=1e-3,2e-3,4e-3 --lr soap=5e-3,1e-2,2e-2

A run does what `hf-soap run SCRIPT --recipe RECIPE --optim NAME --learning_rate LR --seed SEED` does. NAME:OPTIM_ARGS
instead of NAME also sets `--optim_args`, which otherwise are the recipe's.
Its output folder is outputs/measured/RECIPE/NAME-LR-SEED; if that exists, it is read and the run is not repeated. For
each optimizer, the learning rate with the lowest held-out loss at the first seed is run with the other seeds too. The
results are written into the recipe's provenance, their table and the metadata into the card of the same name, and the
curves into a picture.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import EvalResult, ModelCard

from hf_soap.cli.run import prepare, with_recipe
from hf_soap.hub import recipes

OUTPUTS = Path("outputs/measured")
_RESULTS = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Run:
    """One run: its settings in addition to the recipe, and its output folder.

    ``optim`` is the name, with a colon and ``optim_args`` after it unless these are the recipe's.
    """

    optim: str
    learning_rate: float
    seed: int
    folder: Path

    def measured(self) -> dict[str, float]:
        """Returns the final metrics."""
        found: dict[str, float] = json.loads((self.folder / "all_results.json").read_text())
        return found

    def curve(self) -> list[tuple[int, float]]:
        """Returns the steps of the evaluations and their held-out losses."""
        history = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]


def final_loss(run: Run) -> float:
    """Returns the final held-out loss."""
    return run.measured()["eval_loss"]


def run_once(script: Path, recipe: Path, optim: str, learning_rate: float, seed: int) -> Run:
    """Makes one run in this process, unless its results exist."""
    folder = OUTPUTS / recipe.stem / f"{optim}-{learning_rate:g}-{seed}"
    if not (folder / "all_results.json").exists():
        name, colon, optim_args = optim.partition(":")
        options = {"optim": name, "learning_rate": learning_rate, "seed": seed, "output_dir": folder}
        if colon:
            options["optim_args"] = optim_args
        program = [str(script), *(f"--{name}={value}" for name, value in options.items())]
        launch = prepare(with_recipe(program, str(recipe), ()))
        recipes.remember(sys.argv)
        launch()
    return Run(optim, learning_rate, seed, folder)


def row(runs: list[Run], tried: list[Run]) -> dict[str, Any]:
    """Summarizes the runs of one optimizer.

    Args:
        runs: The runs at the best learning rate, one per seed.
        tried: All runs at the first seed.

    Returns:
        Plain values for the recipe. Seconds are those of the first seed.
    """
    measured = [run.measured() for run in runs]
    first = measured[0]
    metrics = [name for name in ("eval_loss", "eval_perplexity", "eval_accuracy") if name in first]
    state = json.loads((runs[0].folder / "trainer_state.json").read_text())
    others = {f"{run.learning_rate:g}": round(run.measured()["eval_loss"], 4) for run in tried}
    del others[f"{runs[0].learning_rate:g}"]
    return {
        "optim": runs[0].optim.removesuffix(":"),
        "learning_rate": runs[0].learning_rate,
        "steps": state["global_step"],
        "seeds": [run.seed for run in runs],
        **{name: [round(each[name], 4) for each in measured] for name in metrics},
        "eval_loss_at_other_rates": others,
        "cpu_seconds": round(first["train_step_cpu_seconds"], 1),
        "optimizer_share": round(first["train_optimizer_cpu_seconds"] / first["train_step_cpu_seconds"], 3),
        "state_bytes_per_parameter": round(first["train_state_bytes_per_parameter"], 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the results as a Markdown table."""
    names = {"eval_loss": "held-out loss", "eval_perplexity": "perplexity", "eval_accuracy": "accuracy"}
    metrics = [name for name in names if name in rows[0]]
    head = ["optimizer", "learning rate", "steps", *(names[name] for name in metrics), "loss at other rates"]
    head += ["CPU seconds", "in `optimizer.step`", "state bytes / parameter"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for each in rows:
        digits = {"eval_perplexity": 2}
        cells = [f"`{each['optim']}`", f"{each['learning_rate']:g}", str(each["steps"])]
        cells += [", ".join(f"{value:.{digits.get(name, 3)}f}" for value in each[name]) for name in metrics]
        cells.append(", ".join(f"{rate}: {loss:.3f}" for rate, loss in each["eval_loss_at_other_rates"].items()))
        cells += [f"{each['cpu_seconds']:.1f}", f"{each['optimizer_share']:.0%}".replace("%", " %")]
        cells.append(f"{each['state_bytes_per_parameter']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def environment(ran: dict[str, Any]) -> str:
    """Returns a line that says where and when the results were measured."""
    hardware = ran["hardware"]
    threads = f", {hardware['threads']} of {hardware['cores']} cores" if "threads" in hardware else ""
    packages = ", ".join(f"{name} {version}" for name, version in ran["packages"].items())
    return f"Measured on {ran['date']}, {hardware['device']}{threads}; {packages}.\n"


def filled(card: str, recipe: recipes.Recipe) -> str:
    """Writes the results in a recipe's provenance into a card: the table, and the metadata of the recipe's own run.

    Args:
        card: Markdown with metadata and with the marks around the table.
        recipe: The recipe.

    Returns:
        The card.
    """
    ran = recipe["provenance"]
    own = next(each for each in ran["results"] if each["optim"] == recipe["optim"])
    filled_in = ModelCard(_RESULTS.sub(lambda _: f"{table(ran['results'])}\n{environment(ran)}", card))
    filled_in.data.eval_results = [
        EvalResult(
            task_type=filled_in.data.pipeline_tag,
            dataset_type=recipe.get("dataset_name", "text"),
            dataset_name=ran["dataset"],
            metric_type=name.removeprefix("eval_"),
            metric_value=own[name][0],
        )
        for name in ("eval_loss", "eval_perplexity", "eval_accuracy")
        if name in own
    ]
    return str(filled_in)


def draw(path: Path, best: list[Run]) -> None:
    """Draws held-out loss over steps, with a line for each optimizer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for run in best:
        label = f"{run.optim.removesuffix(':')}, lr {run.learning_rate:g}"
        axes.plot(*zip(*run.curve(), strict=True), marker=".", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=80)


def main(
    script: Annotated[Path, typer.Argument(exists=True)],
    recipe: Annotated[Path, typer.Argument(exists=True)],
    lr: Annotated[list[str], typer.Option(help="NAME=LR,LR,... or NAME:OPTIM_ARGS=LR,LR,...: the rates to try.")],
    seeds: Annotated[str, typer.Option(help="The first seed chooses the learning rate.")] = "0,1",
) -> None:
    """Make all runs, then write recipe, picture and card."""
    first, *others = map(int, seeds.split(","))
    tried: defaultdict[str, list[Run]] = defaultdict(list)
    for name, _, rates in (each.rpartition("=") for each in lr):
        for rate in rates.split(","):
            tried[name].append(run_once(script, recipe, name, float(rate), first))
    best = sorted((min(runs, key=final_loss) for runs in tried.values()), key=final_loss)
    rows = []
    for run in best:
        again = [run_once(script, recipe, run.optim, run.learning_rate, seed) for seed in others]
        rows.append(row([run, *again], tried[run.optim]))
    content = recipes.read(recipe.read_bytes(), source=str(recipe))
    own = next(run for run in best if run.optim == content["optim"])
    ran = recipes.read((own.folder / recipes.NAME).read_bytes(), source=str(own.folder))["provenance"]
    content["learning_rate"] = own.learning_rate
    kept = {key: ran[key] for key in ("program", "dataset", "hardware", "packages")}
    content["provenance"] = kept | {"date": date.today().isoformat(), "results": rows}
    recipe.write_text(recipes.dump(content))
    draw(recipe.with_suffix(".png"), best)
    card = recipe.with_suffix(".md")
    if card.exists():
        card.write_text(filled(card.read_text(), content))
    typer.echo(table(rows))


if __name__ == "__main__":
    typer.run(main)
