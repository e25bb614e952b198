"""The model card of a run: optimizer, loss curve, results, and the recipe that repeats the run."""

from __future__ import annotations

import inspect
import logging
import math
import os
import platform
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from huggingface_hub import EvalResult, ModelCard
from transformers import TrainerCallback

from hf_soap.engine.optimizer import unwrapped
from hf_soap.hub import adapters, arguments, omissions, recipes
from hf_soap.hub.safety import PROVENANCE
from hf_soap.linalg import processor
from hf_soap.optimizers.names import ENTRIES

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

CARD = "README.md"
CURVE = "loss.png"
PACKAGES = ("hf-soap", "torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "trl", "numpy")

_GENERATED = "<!-- This model card has been generated automatically"
"""Marks a card as written by the Trainer; people remove this comment when they edit the card."""

_IN_CARD, _CARD_ARGUMENTS = "_writes_card", "_card_arguments"
"""Attributes of a trainer: whether it is writing its card, and the arguments with which its program called that."""

_NOT_A_RESULT = re.compile(r".*(_runtime|_per_second|_flos|_time|_memory.*|_mem_.*)|epoch|step")


def complete(trainer: Trainer) -> None:
    """Adds optimizer, curve, results and recipe to the model card that the Trainer wrote.

    Writes ``README.md``, ``recipe.yaml`` and the curve's picture into the output folder.

    Args:
        trainer: A trainer on the rank that writes the card.
    """
    folder = _folder(trainer)
    recipe = write_recipe(trainer)
    drawn = draw_curve(trainer.state.log_history, folder / CURVE)
    card = ModelCard.load(folder / CARD)
    card.text = f"{_name_optimizer(card.text, trainer).rstrip()}\n\n{_section(trainer, recipe, drawn=drawn)}"
    _add_metadata(card, trainer, recipe)
    card.save(folder / CARD)


def try_to_complete(trainer: Trainer) -> None:
    """Calls :func:`complete`, and turns an error into a warning: a failed card must not end a training run.

    Args:
        trainer: A trainer on the rank that writes the card.
    """
    try:
        complete(trainer)
    except Exception as error:
        _warn(trainer, error)


def write_recipe(trainer: Trainer) -> recipes.Recipe:
    """Writes ``recipe.yaml`` into the output folder.

    Args:
        trainer: A trainer on the rank that writes the card.

    Returns:
        The recipe, with provenance.
    """
    made, missing = adapters.options_of(trainer.model, trl=omissions.is_trl(trainer))
    recipe, refused = recipes.of_run(trainer.args, made)
    omitted = omissions.of_launch(trainer) if recipes.LAUNCH else omissions.of_python(trainer)
    recipe[PROVENANCE] = provenance(trainer)
    if recipes.LAUNCH and (made or missing):
        # The program may have created them itself, so that no option describes them.
        recipe[PROVENANCE]["adapter"] = made | ({"others": missing} if missing else {})
    recipe[PROVENANCE] |= {"left_out": refused} if refused else {}
    recipe[PROVENANCE] |= {"not_in_recipe": omitted} if omitted else {}
    (_folder(trainer) / recipes.NAME).write_text(recipes.dump(recipe), encoding="utf-8")
    return recipe


def follow(trainer: Trainer) -> None:
    """Makes a Trainer write a card and a recipe after training.

    Args:
        trainer: Any trainer that is about to train; one that writes its own is left unchanged.
    """
    if getattr(trainer, "completes_cards", False):
        return
    present = [one for one in trainer.callback_handler.callbacks if isinstance(one, _WritesCard)]
    if not present:
        present = [_WritesCard()]
        trainer.add_callback(present[0])
    present[0].trainer = weakref.ref(trainer)


class _WritesCard(TrainerCallback):
    """Writes card and recipe after training."""

    trainer: weakref.ref[Trainer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Omits the trainer; :func:`follow` sets it before the next training."""
        return {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer and self.trainer()
        # A hyperparameter search trains many times in one folder, and the last card would not be that of the best run.
        if trainer and trainer.is_world_process_zero() and not state.is_hyper_param_search:
            try:
                _write_after_training(trainer)
            except Exception as error:
                _warn(trainer, error)


def _write_after_training(trainer: Trainer) -> None:
    path = _folder(trainer) / CARD
    given = vars(trainer).get(_CARD_ARGUMENTS)
    if given is None and path.exists() and _GENERATED not in path.read_text(encoding="utf-8"):
        write_recipe(trainer)
        logger.warning("%s was not written by a Trainer and is not changed; the recipe is in %s", path, recipes.NAME)
        return
    if given is None:
        named = "model_name" in inspect.signature(trainer.create_model_card).parameters
        given = (), {"model_name": path.absolute().parent.name} if named else {}
    trainer.create_model_card(*given[0], **given[1])


def write_and_complete(trainer: Trainer, write: Callable[..., None], args: Any, kwargs: Any) -> None:
    """Calls the method with which a Trainer writes its card, and then completes the card.

    Args:
        trainer: Any trainer that writes a card; one that completes its own cards only writes it.
        write: The method of its class that writes the card. It may call the method of a parent class, which may be
            extended too; a card is completed only once.
        args: Positional arguments of the method.
        kwargs: Keyword arguments of the method.
    """
    if getattr(trainer, "completes_cards", False) or vars(trainer).get(_IN_CARD):
        write(trainer, *args, **kwargs)
        return
    setattr(trainer, _IN_CARD, True)
    try:
        write(trainer, *args, **kwargs)
    finally:
        delattr(trainer, _IN_CARD)
    if trainer.is_world_process_zero():
        setattr(trainer, _CARD_ARGUMENTS, (args, kwargs))
        try_to_complete(trainer)


def _warn(trainer: Trainer, error: Exception) -> None:
    logger.warning(
        "the model card or the recipe in %s could not be written; training continues without it: %s: %s",
        trainer.args.output_dir,
        type(error).__name__,
        error,
    )


def _folder(trainer: Trainer) -> Path:
    return Path(str(trainer.args.output_dir))


def provenance(trainer: Trainer) -> dict[str, Any]:
    """Returns the provenance of a run: program, data, hardware, packages, amount of data, and results.

    Args:
        trainer: A trainer after training.

    Returns:
        Nested plain values. ``samples`` is exact for complete epochs, and correct to within one step for the last.
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
        Whether a curve was drawn: there are losses, and matplotlib is installed.
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
        logger.warning("the model card has no curve, because matplotlib is not installed; pip install matplotlib")
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
    given, name = omissions.optimizer_was_given(trainer), _optimizer_name(trainer)
    template = files("hf_soap.hub").joinpath("card_template.md").read_text(encoding="utf-8")
    text: str = jinja2.Template(template, undefined=jinja2.StrictUndefined, keep_trailing_newline=True).render(
        optim=name,
        given=given,
        optim_args=None if given else args.optim_args,
        options=asdict(arguments.resolve(args)) if name in ENTRIES and not given else {},
        curve=CURVE if drawn else None,
        results=ran["results"],
        program=ran.get("program"),
        takes=recipes.takes_training_arguments(args),
        left_out=ran.get("left_out", []),
        adapted=any(key == "use_peft" or key.startswith("lora_") for key in recipe),
        omitted=ran.get("not_in_recipe", []),
        repeats=_repeats(trainer),
        source=getattr(trainer, "hub_model_id", None) or args.hub_model_id or recipes.NAME,
        recipe=recipes.embed(recipe),
    )
    return text


def _repeats(trainer: Trainer) -> str:
    """Returns how exactly a second run repeats the first."""
    options: Any = {}
    if arguments.optimizer_name(trainer.args) in ENTRIES and not omissions.optimizer_was_given(trainer):
        options = asdict(arguments.resolve(trainer.args))
    if options.get("asynchronous") and options.get("delay") is None:
        return "except for rounding and for the steps at which background roots are done,"
    if torch.cuda.is_available() and not trainer.args.full_determinism:
        return "except for GPU kernels that add in no fixed order (`full_determinism` forbids them),"
    return "bit for bit"


def _optimizer_name(trainer: Trainer) -> str:
    """Returns the name in ``optim``, or the class of an optimizer that the program created."""
    if omissions.optimizer_was_given(trainer):
        return type(unwrapped(trainer.optimizer)).__name__
    return arguments.optimizer_name(trainer.args)


def _name_optimizer(text: str, trainer: Trainer) -> str:
    """Replaces the line on the optimizer, which the Trainer always writes from AdamW's arguments."""
    name = _optimizer_name(trainer)
    if name not in ENTRIES and not omissions.optimizer_was_given(trainer):
        return text
    # optim_args may be on a separate line.
    return re.sub(r"^- optimizer: .*(\n(?!- )\S.*)*", f"- optimizer: {name}, see below", text, flags=re.MULTILINE)


def _add_metadata(card: ModelCard, trainer: Trainer, recipe: recipes.Recipe) -> None:
    name = _optimizer_name(trainer)
    tags = ["hf_soap", name] if name in ENTRIES else ["hf_soap"]
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
    """Returns the dataset or the names of the files, from the program's command line or from the data."""
    given = recipes.options_of_launch(recipes.LAUNCH, trainer.args)[0] if recipes.LAUNCH else {}
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
    except TypeError:  # a stream has no length and no epochs
        return seen
    return min(seen, round(float(state.epoch or 0) * whole))


def _hardware(processes: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {"device": processor.name(device)}
    if device.type == "cuda":
        return {**found, "count": processes}
    return {**found, "cores": os.cpu_count(), "processes": processes, "threads": torch.get_num_threads()}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
