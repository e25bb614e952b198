"""Resuming: finds the newest complete checkpoint, and loads state from other numbers of ranks and formats."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Collection
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import MAGIC_NUMBER

from hf_soap.checkpoint import files, state_dict
from hf_soap.distributed import dtensor
from hf_soap.engine.optimizer import BlockOptimizer, unwrapped
from hf_soap.rules.base import LAYOUT
from hf_soap.trainer import checksums

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

logger = logging.getLogger(__name__)


PLAIN, FULL, SHARDED = "optimizer.pt", "optimizer.bin", "optimizer_0"
"""Names under which the Trainer saves an optimizer: without FSDP, with FULL_STATE_DICT, with SHARDED_STATE_DICT."""

FSDP = "pytorch_model_fsdp"
"""Prefix of the names under which the Trainer saves weights with FSDP: a file, or a folder of parts."""

SCHEDULER = "scheduler.pt"
WHOLE = ("model.safetensors", "pytorch_model.bin")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Names of weights that the Trainer looks for, in its order."""


def load_optimizer(trainer: Trainer, folder: Path) -> bool:
    """Loads optimizer and scheduler if the Trainer cannot.

    The Trainer cannot load them if they were saved on another number of ranks, in another format, or with other param
    groups or settings. It loads both or neither, for any optimizer.

    Args:
        trainer: A Trainer that has its optimizer and scheduler.
        folder: The folder to resume from; every rank must be able to read it.

    Returns:
        False if nothing was done, because the Trainer can load them or the optimizer is not from this package.

    Raises:
        ValueError: If the saved state does not fit the parameters, or is from this package and the optimizer is not.
    """
    optimizer = unwrapped(trainer.optimizer)
    saved = [folder / name for name in (PLAIN, FULL, SHARDED) if (folder / name).exists()]
    has_both = bool(saved) and (folder / SCHEDULER).is_file()
    if not isinstance(optimizer, BlockOptimizer):
        if has_both and not trainer.is_deepspeed_enabled:
            _refuse_state_of_family(optimizer, saved)
        return False
    native = folder / _format(trainer)
    if not has_both:
        missing = f"{SCHEDULER}, without which the Trainer loads no optimizer" if saved else "optimizer"
        logger.warning(
            "%s has no %s (was it removed, or saved with save_only_model=True?): %s starts without state, and the "
            "learning rate from the beginning of its schedule; the step count continues.",
            folder,
            missing,
            type(optimizer).__name__,
        )
        optimizer.restart_average()
        return False  # the Trainer starts from scratch too
    if native.name == PLAIN:  # the Trainer would load all owners' state on every device
        fits = not optimizer.spreads_state()
    else:
        fits = native in saved and optimizer.fits(files.saved_shapes(native))
    schedule, groups = torch.load(folder / SCHEDULER, weights_only=True), optimizer.param_groups
    same_groups = len(schedule.get(LAST_RATES, groups)) == len(groups)
    if native in saved and fits:
        same = same_groups and (native.name != SHARDED or files.has_settings(native, groups))
        # FSDP loads only what the optimizer has already, and requires all of it.
        averaged = native.name != PLAIN and (optimizer.averages_weights or files.has_averages(native))
        if same and not averaged:
            return False
        if not same:
            logger.warning(
                "Loading the optimizer from %s, which was saved with other param groups or settings.", native
            )
        model: Any = trainer.model
        is_sharded = native.name == SHARDED
        state = files.read_part(native, model, optimizer) if is_sharded else files.read(native)
    else:
        source = native if native in saved else saved[0]
        logger.warning("Loading the optimizer from %s, which was saved on other ranks or in another format.", source)
        state = files.read(source)
    optimizer.load_state_dict(state)
    scheduler: Any = trainer.lr_scheduler
    scheduler.load_state_dict(schedule if same_groups else _for_groups(groups, schedule, scheduler.state_dict()))
    return True


LAST_RATES = "_last_lr"
"""Key under which a scheduler stores the current learning rate of each param group."""


def _for_groups(groups: list[dict[str, Any]], saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Converts the saved state of a scheduler to other param groups, whose rates were loaded with the optimizer.

    Args:
        groups: The optimizer's param groups.
        saved: The scheduler's saved state, with a learning rate for each former group.
        own: The scheduler's present state.
    """
    count = len(saved[LAST_RATES])
    of_groups = [key for key, value in saved.items() if isinstance(value, list) and len(value) == count and key in own]
    rates = {LAST_RATES: [group["lr"] for group in groups]}
    if "base_lrs" in saved:
        rates["base_lrs"] = [group["initial_lr"] for group in groups]
    return {**saved, **{key: own[key] for key in of_groups}, **rates}


def _refuse_state_of_family(optimizer: Any, saved: list[Path]) -> None:
    """Refuses state of this package for another optimizer, which would fail at its first step or misread the state.

    Raises:
        ValueError: If any of the saved files or folders contains such state.
    """
    if state_dict.is_of_family(optimizer.param_groups):
        return  # it wraps an optimizer of this package
    wrote = next((name for source in saved if (name := _written_by(source))), None)
    if wrote is None:
        return
    wants, files = type(optimizer).__name__, " and ".join(path.name for path in saved)
    raise ValueError(
        f"got a checkpoint of {wrote}, wanted one of {wants}, in {saved[0].parent}. To go on with {wrote}, resume "
        f"with the optim (such as optim={wrote.lower()!r}) and the optim_args that wrote it. To go on with the "
        f"weights alone, remove {files} from the folder: {wants} then starts without state, and the learning rate "
        "from the beginning of its schedule; the step count continues"
    )


def _written_by(source: Path) -> str | None:
    """Returns the class of this package that saved an optimizer, or None if another optimizer was saved."""
    try:
        if source.is_dir():  # the metadata list the roles, so that no tensor is read
            known = {role for roles in files.saved_shapes(source).values() for role in roles}
            if known & {"prev_grad", "prev_param"}:
                return "MARS"
            if LAYOUT not in known:  # our state has it for every tensor with a factor, and no other has it
                return None
            return "Shampoo" if "root_0" in known else "SOAP"
        groups = files.read(source)["param_groups"]
    except Exception:  # if this fails, the Trainer tries to read it and reports the error
        return None
    if not (groups and state_dict.is_of_family(groups)):
        return None
    return "MARS" if "variant" in groups[0] else "Shampoo" if "root_method" in groups[0] else "SOAP"


def load_model(trainer: Trainer, folder: Path, model: nn.Module) -> bool:
    """Loads weights if the Trainer cannot: saved with FSDP and loaded without, or in another format of state dict.

    Args:
        trainer: The Trainer.
        folder: The folder to resume from; every rank must be able to read it.
        model: The model, sharded or not.

    Returns:
        False if nothing was done, because the Trainer can load them itself.
    """
    full, sharded = folder / f"{FSDP}.bin", folder / f"{FSDP}_0"
    saved = {FULL: [full] if full.is_file() else [], SHARDED: [sharded] if sharded.is_dir() else []}
    if not any(saved.values()):  # the Trainer may save these too with FSDP, but does not load them then
        saved[PLAIN] = [path for path in _plain_weights(folder)[0] if path.parent == folder]
    others = next((files for files in saved.values() if files), [])
    if saved.get(_format(trainer)) or not others:
        return False
    weights: dict[str, Tensor] = {}
    for source in others:
        weights |= files.read_weights(source)
    logger.warning("Loading the weights from %s, which were saved in another format.", others[0])
    files.load_weights(model, weights)
    return True


def _format(trainer: Trainer) -> str:
    if not trainer.is_fsdp_enabled:
        return PLAIN
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    return FULL if "FULL" in str(plugin.state_dict_type) else SHARDED


def choose(trainer: Trainer, asked: str | bool | None) -> str | bool | None:
    """Returns the folder that ``train(resume_from_checkpoint=asked)`` resumes from; all ranks must call this.

    Args:
        trainer: The Trainer.
        asked: A folder, or True for the newest complete one in ``output_dir``.

    Returns:
        The folder, or ``asked`` if it is not a folder.

    Raises:
        ValueError: If no checkpoint is complete, or the named checkpoint is damaged.
    """
    writers = checksums.writers(trainer.args)
    share = (writers.index(trainer.args.process_index), len(writers))
    if asked is True:
        folder = trainer.args.output_dir or "."
        found = last_complete_checkpoint(folder, share=share)
        if found is None:
            raise ValueError(  # begins with the Trainer's words, for which programs look
                f"No valid checkpoint found in output directory ({folder}): got resume_from_checkpoint=True, wanted a "
                "complete checkpoint there; pass the folder of one, or start without resume_from_checkpoint"
            )
        logger.info("Resuming from %s, the newest complete checkpoint.", found)
        asked = str(found)
    else:
        named = Path(asked or "")
        if not asked or not all(dtensor.from_all(os.path.isdir(named))):  # noqa: PTH112 - Path.is_dir raises some errors
            return asked
        if problem := _of_any_rank(_why_unfinished(named) or find_damage(named, share=share)):
            other = last_complete_checkpoint(named.parent, share=share)
            instead = f"resume from {other}" if other else "start without resume_from_checkpoint"
            raise ValueError(
                f"got a damaged checkpoint, wanted a whole one: in {named}, {problem}; {instead}, or remove "
                f"{checksums.NAME.format('*')} if you changed files on purpose"
            )
    if share[0] == 0:
        _warn_of_missing(Path(asked))
    return asked


def last_complete_checkpoint(folder: str | Path, *, share: tuple[int, int] | None = None) -> Path | None:
    """Returns the newest complete ``checkpoint-N`` folder, and warns about each newer one that it skips.

    Args:
        folder: The Trainer's ``output_dir``.
        share: Index of this rank's part of the files to compare with their checksums, and the number of parts. All
            ranks must call this, and get the same result. None if only this rank calls it.

    Returns:
        The folder, or None if there is no complete one.
    """
    numbers = _numbers_in(folder)
    for number in sorted(dtensor.from_all(numbers)[0] if share else numbers, reverse=True):
        path = Path(folder) / f"checkpoint-{number}"
        problem = find_problem(path, share=share or (0, 1))
        if share:
            problem = _of_any_rank(problem)
        if problem is None:
            return path
        logger.warning("%s is incomplete and is skipped: %s", path, problem)
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


def _of_any_rank(problem: str | None) -> str | None:
    return next((found for found in dtensor.from_all(problem) if found), None)


P = ParamSpec("P")


def _errors_as_problems(check: Callable[P, str | None]) -> Callable[P, str | None]:
    """Returns errors of the file system as a problem: raised on one rank, they would leave the others waiting."""

    @wraps(check)
    def checked(*args: P.args, **kwargs: P.kwargs) -> str | None:
        try:
            return check(*args, **kwargs)
        except OSError as error:
            return f"it is unreadable ({error})"

    return checked


@_errors_as_problems
def find_problem(folder: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Says why a checkpoint cannot be resumed; returns None if it is complete and undamaged.

    Args:
        folder: The checkpoint.
        share: Index of the part of the files to compare with their checksums, and the number of parts.
    """
    if problem := _why_unfinished(folder) or find_damage(folder, share=share):
        return problem
    return None if any(folder.rglob("*model*")) else "no model weights"


@_errors_as_problems
def _why_unfinished(folder: Path) -> str | None:
    if (folder / checksums.INCOMPLETE).exists():
        return "the process ended while it was being saved"
    try:
        json.loads((folder / "trainer_state.json").read_text())  # written last
    except (OSError, ValueError) as error:
        return f"trainer_state.json: {error}"
    return None


@_errors_as_problems
def find_damage(folder: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Names a damaged file in a checkpoint folder, or returns None.

    Files are compared with the checksums that were saved with them, if there are any. Otherwise, files of torch.save
    are compared with the checksums inside them, and other files are checked for missing ends, as a killed process
    leaves them.

    A missing file does not count as damage if the Trainer can continue without it, or with other files instead: since
    ``trainer_state.json`` is written last, a user must have removed it.

    Args:
        folder: The checkpoint.
        share: Index of the part of the files to compare with their checksums, and the number of parts.
    """
    weights, problem = _plain_weights(folder)
    if problem:
        return problem
    parts = {path.parent for kind in (".metadata", "*.distcp") for path in folder.glob(f"*/{kind}")}
    for part in sorted(parts):
        if not (part / ".metadata").is_file():  # written last
            return f"{part.name} has no .metadata"
    try:
        noted, missing = checksums.read(folder)
    except ValueError as error:
        return str(error)
    if missing and parts:  # then some parts of that rank may be missing too
        return f"{missing[0]} is missing"
    saved = [*weights, *(folder / name for name in (f"{FSDP}.bin", PLAIN, FULL, SCHEDULER, "scaler.pt"))]
    saved += sorted(folder.glob("rng_state*.pth"))  # the Trainer fails on an incomplete one, but continues without any
    for path in saved:
        name = path.relative_to(folder).as_posix()
        if path.is_file() and (problem := _damage(path, contents=name not in noted)):
            return f"{name} is {problem}"
    excused = _excused(folder, noted)
    return checksums.find_problem(folder, {k: v for k, v in noted.items() if k not in excused}, share=share)


def _plain_weights(folder: Path) -> tuple[list[Path], str | None]:
    """Returns the files from which the Trainer loads weights without FSDP, and the problem with them, or None."""
    for name in WHOLE:
        if (folder / name).is_file():
            return [folder / name], None  # even if there is an index
    files: list[Path] = []
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):  # one for each adapter
        files += [place / name for name in ADAPTER if (place / name).is_file()][:1]
    index = next((folder / name for name in INDEX if (folder / name).is_file()), None)
    if index is None:
        return files, None
    try:
        tensors: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = {name: folder / name for name in sorted(set(tensors.values()))}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return files, f"{index.name}: {error}"
    for name, shard in shards.items():
        if not shard.is_file():
            return files, f"{name} is missing"
        if shard.suffix == ".safetensors":
            problem, held = _contents_of_safetensors(shard)
            # The Trainer does not check this, and would continue with untrained weights.
            if lost := sorted(tensor for tensor, at in tensors.items() if at == name and tensor not in held):
                problem = problem or f"without the tensor {lost[0]}, which {index.name} expects in it"
            if problem:
                return files, f"{name} is {problem}"
    return [*files, *shards.values()], None


def _excused(folder: Path, noted: Collection[str]) -> set[str]:
    """Returns the names of missing files that are no damage: the Trainer continues without them, or with others."""
    gone = {name for name in noted if not (folder / name).is_file()}
    loaded = {*_plain_weights(folder)[0], *folder.glob(f"{FSDP}.bin"), *folder.glob(f"{FSDP}_[0-9]*")}
    places = {(path.parent, _is_of_adapter(path)) for path in loaded}
    excused = set()
    for name in gone:
        path, part = folder / name, folder / name.partition("/")[0]
        if _PART.match(name):
            whole_is_gone = not part.exists()
            if whole_is_gone and (part.name.startswith("optimizer") or (folder, False) in places):
                excused.add(name)
        elif not (name in INDEX or _WEIGHTS.fullmatch(path.name)) or (path.parent, _is_of_adapter(path)) in places:
            excused.add(name)
    if any(_WEIGHTS.fullmatch(name) for name in gone):  # the weights were split into other files
        excused |= {*INDEX}
    return excused


def _is_of_adapter(path: Path) -> bool:
    return path.name.startswith("adapter_model")


def _warn_of_missing(folder: Path) -> None:
    """Warns about missing files, except for those of which :func:`load_optimizer` warns."""
    noted, gone = checksums.read(folder)
    gone += sorted(name for name in noted if not (folder / name).is_file())
    random = [name for name in gone if _RANDOM.fullmatch(name)]
    if random or not any(folder.glob("rng_state*.pth")):
        logger.warning(
            "%s has no %s: random numbers, such as those of dropout, differ from those of the run that saved it.",
            folder,
            ", ".join(random or ["rng_state.pth"]),
        )
    if weights := [name for name in gone if _WEIGHTS.fullmatch(Path(name).name) or name.startswith(FSDP)]:
        logger.warning(
            "%s no longer has %s: weights are loaded from other files, for which there may be no checksums.",
            folder,
            ", ".join(weights),
        )
    ours = {*random, *weights, SCHEDULER, PLAIN, FULL}
    if others := [name for name in gone if name not in ours and not _PART.match(name)]:
        logger.warning("%s no longer has %s: the run continues without.", folder, ", ".join(others))


_NUMBER = re.compile(r"^checkpoint-(\d+)$")
_WEIGHTS = re.compile(r"(?:model|adapter_model|pytorch_model)(?:-\d+-of-\d+|_fsdp)?\.(?:safetensors|bin)")
_PART = re.compile(rf"(?:optimizer|{FSDP})_\d+/")
_RANDOM = re.compile(r"rng_state(?:_\d+)?\.pth")


def _damage(path: Path, *, contents: bool) -> str | None:
    if path.suffix == ".safetensors":
        return _contents_of_safetensors(path)[0]
    return _damage_of_zip(path, contents=contents)


def _contents_of_safetensors(path: Path) -> tuple[str | None, set[str]]:
    """Returns the problem with a file, or None, and the names of its tensors."""
    try:
        with safe_open(path, framework="pt") as file:  # reads the header, which must match the length of the file
            return None, set(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        return f"cut off or unreadable ({error})", set()


_BEFORE_ZIP = pickle.dumps(MAGIC_NUMBER, protocol=2)
"""First bytes of files of torch.save in its old format, which is not a zip."""


def _damage_of_zip(path: Path, *, contents: bool) -> str | None:
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as stream:
                if stream.read(len(_BEFORE_ZIP)) != _BEFORE_ZIP:
                    return "cut off"
            torch.load(path, map_location="cpu", weights_only=True)  # fails if bytes are missing
            return None
        if path.suffix != ".pth":  # random states contain numpy arrays, which only the Trainer allows
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # reads no tensors yet
        if not contents:
            return None
        with zipfile.ZipFile(path) as file:
            # torch.load does not verify checksums, and reads an entry that is marked as a folder as empty.
            folders = [info.filename for info in file.infolist() if info.external_attr or info.is_dir()]
            damaged = folders[0] if folders else file.testzip()
    except Exception as error:  # a wrong length or a hostile pickle can raise anything
        return f"unreadable ({str(error).partition(chr(10))[0]})"
    return f"damaged ({damaged} in it has changed since it was written)" if damaged else None
