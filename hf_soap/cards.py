"""What a model card says of a run: the optimizer, the curve, the results, and the recipe to repeat it."""

from __future__ import annotations

import logging
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from huggingface_hub import EvalResult, ModelCard

from hf_soap import recipes, registry
from hf_soap.recipes.safety import PROVENANCE

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

CURVE = "loss.png"
PACKAGES = ("hf-soap", "torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "trl", "numpy")

_NOT_A_RESULT = re.compile(r".*(_runtime|_per_second|_flos|_time|_memory.*|_mem_.*)|epoch|step")


def complete(trainer: Trainer) -> None:
    """Adds optimizer, curve, results and recipe to the model card that the Trainer wrote.

    Writes ``README.md``, ``recipe.yaml`` and the curve's picture into the output folder.

    Args:
        trainer: On the rank that writes the card.
    """
    folder = Path(str(trainer.args.output_dir))
    recipe, left_out = recipes.of_run(trainer.args)
    recipe[PROVENANCE] = provenance(trainer) | ({"left_out": left_out} if left_out else {})
    (folder / recipes.NAME).write_text(recipes.dump(recipe), encoding="utf-8")
    drawn = draw_curve(trainer.state.log_history, folder / CURVE)
    card = ModelCard.load(folder / "README.md")
    card.text = f"{_name_optimizer(card.text, trainer.args).rstrip()}\n\n{_section(trainer, recipe, drawn=drawn)}"
    _add_metadata(card, trainer, recipe)
    card.save(folder / "README.md")


def provenance(trainer: Trainer) -> dict[str, Any]:
    """Says how a run went: program, data, hardware, packages, how much was seen, and what came out.

    Args:
        trainer: After training.

    Returns:
        Nested plain values. ``samples`` counts whole epochs exactly and the begun one to within one step.
    """
    state = trainer.state
    seen: dict[str, Any] = {"steps": state.global_step, "epochs": round(float(state.epoch or 0), 4)}
    if tokens := int(getattr(state, "num_input_tokens_seen", 0)):
        seen["tokens"] = tokens
    else:
        seen["samples"] = _samples(trainer)
    return {
        **({"program": recipes.LAUNCH.program} if recipes.LAUNCH else {}),
        **({"dataset": name} if (name := _dataset_name(trainer)) else {}),
        "seen": seen,
        "hardware": _hardware(trainer.args.world_size),
        "packages": {"python": platform.python_version(), **_versions()},
        "results": {
            name: value if math.isfinite(value) else str(value) for name, value in results(state.log_history).items()
        },
    }


def results(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the metrics of the last evaluation and the mean training loss, from a Trainer's log."""
    found: dict[str, float] = {}
    for entry in log_history:
        if "train_loss" in entry or any(name.startswith("eval_") for name in entry):
            numbers = {name: float(value) for name, value in entry.items() if isinstance(value, (int, float))}
            found |= {name: value for name, value in numbers.items() if not _NOT_A_RESULT.fullmatch(name)}
    return {name: value for name, value in found.items() if name == "train_loss" or name.startswith("eval_")}


def draw_curve(log_history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws training and evaluation loss over steps.

    Args:
        log_history: A Trainer's log.
        path: The PNG to write.

    Returns:
        Whether there was anything to draw and matplotlib to draw it with.
    """
    curves = {
        label: [(entry["step"], entry[name]) for entry in log_history if name in entry]
        for name, label in (("loss", "training"), ("eval_loss", "evaluation"))
    }
    if not any(curves.values()):
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("the model card has no curve, since matplotlib is not installed; pip install matplotlib")
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _section(trainer: Trainer, recipe: recipes.Recipe, *, drawn: bool) -> str:
    args, ran = trainer.args, recipe[PROVENANCE]
    ours = registry.optimizer_name(args) in registry.ENTRIES
    template = files("hf_soap").joinpath("card_template.md").read_text(encoding="utf-8")
    text: str = jinja2.Template(template, undefined=jinja2.StrictUndefined, keep_trailing_newline=True).render(
        optim=registry.optimizer_name(args),
        optim_args=args.optim_args,
        options=asdict(registry.resolve(args)) if ours else {},
        curve=CURVE if drawn else None,
        results=ran["results"],
        program=ran.get("program"),
        left_out=ran.get("left_out", []),
        source=getattr(trainer, "hub_model_id", None) or args.hub_model_id or recipes.NAME,
        recipe=recipes.embed(recipe),
    )
    return text


def _name_optimizer(text: str, args: Any) -> str:
    """Replaces the line that the Trainer writes from AdamW's arguments, whatever the optimizer."""
    name = registry.optimizer_name(args)
    if name not in registry.ENTRIES:
        return text
    # optim_args may stand on a line of their own.
    return re.sub(r"^- optimizer: .*(\n(?!- )\S.*)*", f"- optimizer: {name}, see below", text, flags=re.MULTILINE)


def _add_metadata(card: ModelCard, trainer: Trainer, recipe: recipes.Recipe) -> None:
    name = registry.optimizer_name(trainer.args)
    tags = ["hf_soap", name] if name in registry.ENTRIES else ["hf_soap"]
    data: Any = card.data
    data.tags = list(dict.fromkeys([*(data.tags or []), *tags]))
    data.model_name = data.model_name or Path(str(trainer.args.output_dir)).name
    dataset = _dataset_name(trainer) or "unknown"
    measured = results(trainer.state.log_history).items()
    finite = {key: value for key, value in measured if key.startswith("eval_") and math.isfinite(value)}
    data.eval_results = [
        *(result for result in data.eval_results or [] if f"eval_{result.metric_type}" not in finite),
        *(
            EvalResult(
                task_type=_task(trainer),
                dataset_type=recipe.get("dataset_name") or "text",
                dataset_name=dataset,
                metric_type=key.removeprefix("eval_"),
                metric_name=key,
                metric_value=value,
            )
            for key, value in finite.items()
        ),
    ]


def _task(trainer: Trainer) -> str:
    from transformers import modelcard

    tasks: Any = modelcard.TASK_MAPPING
    model: Any = trainer.model
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    return next((task for task, names in tasks.items() if name in map(str, names.values())), "other")


def _dataset_name(trainer: Trainer) -> str | None:
    """The dataset or the names of the files, as the program's command line or the data themselves tell."""
    given = recipes.from_arguments(recipes.LAUNCH.arguments) if recipes.LAUNCH else {}
    for key in ("dataset_name", "train_files", "train_file"):
        if value := given.get(key):
            names = value if isinstance(value, list) else [value]
            return ", ".join(str(name) if key == "dataset_name" else Path(str(name)).name for name in names)
    info: Any = getattr(trainer.train_dataset, "info", None)
    return getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)


def _samples(trainer: Trainer) -> int:
    args, state = trainer.args, trainer.state
    seen: int = state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    try:
        whole = len(trainer.train_dataset)  # type: ignore[arg-type]
    except TypeError:  # a stream has no length, and its epochs are none
        return seen
    return min(seen, round(float(state.epoch or 0) * whole))


def _hardware(processes: int) -> dict[str, Any]:
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "count": processes}
    return {"device": _cpu(), "cores": os.cpu_count(), "processes": processes, "threads": torch.get_num_threads()}


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists() and (found := re.search(r"^model name\s*: (.+)$", listing.read_text(), re.MULTILINE)):
        return found.group(1).strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
