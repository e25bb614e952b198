"""Finding the last checkpoint folder that was written to its end, and loading an optimizer that another run saved."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_soap import checkpoint, checksums, sharding
from hf_soap.stepping import BlockOptimizer, unwrapped

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

logger = logging.getLogger(__name__)


PLAIN, FULL, SHARDED = "optimizer.pt", "optimizer.bin", "optimizer_0"
"""Where the Trainer saves an optimizer: without FSDP, with its FULL_STATE_DICT, with its SHARDED_STATE_DICT."""


def load_optimizer(trainer: Trainer, folder: Path) -> bool:
    """Loads optimizer and scheduler where the Trainer cannot.

    That is where they were saved on another number of ranks, in another format, or by a version that had other param
    groups or settings.

    Args:
        trainer: A Trainer whose optimizer and scheduler are made.
        folder: The folder to resume from; every rank must see it.

    Returns:
        False if nothing was done, because the Trainer can load it or the optimizer is not of this package.

    Raises:
        ValueError: If the saved state does not fit the parameters.
    """
    optimizer = unwrapped(trainer.optimizer)
    if not isinstance(optimizer, BlockOptimizer):
        return False
    saved = [folder / name for name in (PLAIN, FULL, SHARDED) if (folder / name).exists()]
    native = folder / _format(trainer)
    if not saved or not (folder / "scheduler.pt").is_file():
        logger.warning(
            "%s has no optimizer or no scheduler (save_only_model=True?): %s starts without state, and the learning "
            "rate from the beginning of its schedule, while steps are counted on.",
            folder,
            type(optimizer).__name__,
        )
        return False  # the Trainer starts afresh too
    if native.name == PLAIN:  # state that owners spread must not come whole to every device, as with the Trainer
        fits = not optimizer.spreads_state()
    else:
        fits = native in saved and optimizer.fits(checkpoint.saved_shapes(native))
    schedule, groups = torch.load(folder / "scheduler.pt", weights_only=True), optimizer.param_groups
    alike = len(schedule.get(LAST_RATES, groups)) == len(groups)
    if native in saved and fits:
        if alike and (native.name != SHARDED or checkpoint.has_settings(native, groups)):
            return False
        logger.warning("Loading the optimizer from %s, which was saved with other param groups or settings.", native)
        model: Any = trainer.model
        is_sharded = native.name == SHARDED
        state = checkpoint.read_part(native, model, optimizer) if is_sharded else checkpoint.read(native)
    else:
        source = native if native in saved else saved[0]
        logger.warning("Loading the optimizer from %s, which was saved on other ranks or in another format.", source)
        state = checkpoint.read(source)
    optimizer.load_state_dict(state)
    scheduler: Any = trainer.lr_scheduler
    scheduler.load_state_dict(schedule if alike else _for_groups(groups, schedule, scheduler.state_dict()))
    return True


LAST_RATES = "_last_lr"
"""Where a scheduler keeps the current rate of each param group."""


def _for_groups(groups: list[dict[str, Any]], saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Returns saved state of a scheduler for other param groups, whose rates were loaded with the optimizer.

    Args:
        groups: The optimizer's param groups.
        saved: The scheduler's state, with as many rates as there were groups.
        own: Its state as it is now.
    """
    count = len(saved[LAST_RATES])
    of_groups = [key for key, value in saved.items() if isinstance(value, list) and len(value) == count and key in own]
    rates = {LAST_RATES: [group["lr"] for group in groups]}
    if "base_lrs" in saved:
        rates["base_lrs"] = [group["initial_lr"] for group in groups]
    return {**saved, **{key: own[key] for key in of_groups}, **rates}


def load_model(trainer: Trainer, folder: Path, model: nn.Module) -> bool:
    """Loads weights where the Trainer cannot: saved with FSDP and loaded without it, or in another kind of state dict.

    Args:
        trainer: The Trainer.
        folder: The folder to resume from; every rank must see it.
        model: The model, sharded or not.

    Returns:
        False if nothing was done, because the Trainer can load them itself.
    """
    full, sharded = folder / "pytorch_model_fsdp.bin", folder / "pytorch_model_fsdp_0"
    saved = {FULL: [full] if full.is_file() else [], SHARDED: [sharded] if sharded.is_dir() else []}
    if not any(saved.values()):  # with FSDP the Trainer may save these too, but does not load them without it
        kinds = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
        saved[PLAIN] = sorted(path for kind in kinds for path in folder.glob(kind))
    others = next((files for files in saved.values() if files), [])
    if saved.get(_format(trainer)) or not others:
        return False
    weights: dict[str, Tensor] = {}
    for source in others:
        weights |= checkpoint.read_weights(source)
    logger.warning("Loading the weights from %s, which were saved in another format.", others[0])
    checkpoint.load_weights(model, weights)
    return True


def _format(trainer: Trainer) -> str:
    if not trainer.is_fsdp_enabled:
        return PLAIN
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    return FULL if "FULL" in str(plugin.state_dict_type) else SHARDED


def choose(trainer: Trainer, asked: str | bool | None) -> str | bool | None:
    """Finds the folder that ``train(resume_from_checkpoint=asked)`` resumes from; all ranks must call this.

    Args:
        trainer: The Trainer.
        asked: A folder, or True for the newest complete one in ``output_dir``.

    Returns:
        The folder, or ``asked`` where that names none.

    Raises:
        ValueError: If no checkpoint is complete, or files of the one that was named are damaged.
    """
    writers = checksums.writers(trainer.args)
    share = (writers.index(trainer.args.process_index), len(writers))
    if asked is True:
        folder = trainer.args.output_dir or "."
        found = last_complete_checkpoint(folder, model_only=trainer.args.save_only_model, share=share)
        if found is None:
            raise ValueError(
                f"got resume_from_checkpoint=True, wanted a complete checkpoint in {folder}, found none; "
                "pass the folder of one, or start without resume_from_checkpoint"
            )
        logger.info("Resuming from %s, the newest complete checkpoint.", found)
        return str(found)
    named = Path(asked or "")
    if not asked or not all(sharding.from_all(os.path.isdir(named))):  # noqa: PTH112 - Path's raises on some errors
        return asked
    if problem := _said_by_any(_why_unfinished(named) or find_damage(named, share=share)):
        other = last_complete_checkpoint(named.parent, model_only=trainer.args.save_only_model, share=share)
        instead = f"resume from {other}" if other else "start without resume_from_checkpoint"
        raise ValueError(
            f"got a damaged checkpoint, wanted a whole one: in {named}, {problem}; {instead}, or remove "
            f"{checksums.NAME.format('*')} if you changed files on purpose"
        )
    return asked


def last_complete_checkpoint(
    folder: str | Path, *, model_only: bool = False, share: tuple[int, int] | None = None
) -> Path | None:
    """Finds the newest complete ``checkpoint-N`` folder, and warns about each newer one that it passes over.

    Args:
        folder: The Trainer's ``output_dir``.
        model_only: Whether checkpoints hold no optimizer (``save_only_model``).
        share: Which part of the contents this rank compares with their checksums, and of how many: all ranks call
            this, and all get the same answer. None if one asks for itself.

    Returns:
        The folder, or None if there is no complete one.
    """
    numbers = _numbers_in(folder)
    for number in sorted(sharding.from_all(numbers)[0] if share else numbers, reverse=True):
        path = Path(folder) / f"checkpoint-{number}"
        problem = find_problem(path, model_only=model_only, share=share or (0, 1))
        if share:
            problem = _said_by_any(problem)
        if problem is None:
            return path
        logger.warning("%s is incomplete and is passed over: %s", path, problem)
    return None


def _numbers_in(folder: str | Path) -> list[int]:
    try:
        names = [path.name for path in Path(folder).iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("%s cannot be listed: %s", folder, error)
        return []
    return [int(match[1]) for name in names if (match := _NUMBER.search(name))]


def _said_by_any(problem: str | None) -> str | None:
    return next((said for said in sharding.from_all(problem) if said), None)


P = ParamSpec("P")


def _errors_said(check: Callable[P, str | None]) -> Callable[P, str | None]:
    """Makes an error of the disk a problem of the folder: raised on one rank, it leaves the others waiting for it."""

    @wraps(check)
    def checked(*args: P.args, **kwargs: P.kwargs) -> str | None:
        try:
            return check(*args, **kwargs)
        except OSError as error:
            return f"it is unreadable ({error})"

    return checked


@_errors_said
def find_problem(folder: Path, *, model_only: bool = False, share: tuple[int, int] = (0, 1)) -> str | None:
    """Says what keeps a checkpoint folder from being resumed, or None if all of its files are there and whole.

    Args:
        folder: The checkpoint.
        model_only: Whether it was saved without optimizer.
        share: Which part of the contents to compare with their checksums, and of how many.
    """
    if unfinished := _why_unfinished(folder):
        return unfinished
    if not any(folder.glob("*model*")):
        return "no model weights"
    wanted = [] if model_only else [folder / "scheduler.pt"]
    if not model_only and not any(folder.glob("optimizer_[0-9]*")) and not (folder / FULL).is_file():
        wanted.append(folder / PLAIN)
    missing = next((f"{path.name} is missing" for path in wanted if not path.is_file()), None)
    return missing or find_damage(folder, share=share)


@_errors_said
def _why_unfinished(folder: Path) -> str | None:
    if (folder / checksums.INCOMPLETE).exists():
        return "the process ended while it was saved"
    try:
        json.loads((folder / "trainer_state.json").read_text())  # written last
    except (OSError, ValueError) as error:
        return f"trainer_state.json: {error}"
    return None


@_errors_said
def find_damage(folder: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Says which of the files in a checkpoint folder is not whole, or None.

    Contents are compared with the checksums that were saved beside them, if they were; else files of torch.save with
    those that they hold, and the others are looked at for ends that a killed process left unwritten.

    Args:
        folder: The checkpoint.
        share: Which part of the contents to compare with their checksums, and of how many.
    """
    weights = [path for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)]
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            return f"{index.name}: {error}"
        if missing := sorted(shards - {path.name for path in weights}):
            return f"{missing[0]} is missing"
    for part in (*folder.glob("optimizer_[0-9]*"), *folder.glob("pytorch_model_fsdp_[0-9]*")):
        if part.is_dir() and not (part / ".metadata").is_file():  # written last
            return f"{part.name} has no .metadata"
    saved = [*weights, *(folder / name for name in (PLAIN, FULL, "scheduler.pt", "scaler.pt"))]
    saved += sorted(folder.glob("rng_state*.pth"))  # half of one stops the Trainer, which warns of a missing one
    noted = checksums.exist(folder)
    for path in saved:
        if path.is_file() and (problem := _damage(path, contents=not noted)):
            return f"{path.name} is {problem}"
    return checksums.find_problem(folder, share=share)


_NUMBER = re.compile(r"^checkpoint-(\d+)$")


def _damage(path: Path, *, contents: bool) -> str | None:
    return _damage_of_safetensors(path) if path.suffix == ".safetensors" else _damage_of_zip(path, contents=contents)


def _damage_of_safetensors(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt"):  # reads the header, which must fit the length of the file
            return None
    except (SafetensorError, OSError, ValueError) as error:
        return f"cut off or unreadable ({error})"


def _damage_of_zip(path: Path, *, contents: bool) -> str | None:
    try:
        if not zipfile.is_zipfile(path):
            return "cut off"
        if path.suffix != ".pth":  # random states hold arrays of numpy, which only the Trainer allows
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # reads no tensors yet
        if not contents:
            return None
        with zipfile.ZipFile(path) as file:
            # torch.load reads tensors without their checksums, and as nothing what passes for a folder.
            folders = [info.filename for info in file.infolist() if info.external_attr or info.is_dir()]
            damaged = folders[0] if folders else file.testzip()
    except Exception as error:  # whatever a wrong length or a hostile pickle leads to
        return f"unreadable ({str(error).partition(chr(10))[0]})"
    return f"damaged ({damaged} in it is not what was written)" if damaged else None
