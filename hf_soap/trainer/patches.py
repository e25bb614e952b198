"""Everything that is replaced in transformers, in one table, and how a version that differs is dealt with.

Each replacement first checks that its target is there and takes the parameters that it relies on. Where it does not,
the convenience that the target belongs to is left out, one warning names all that is missing, and training goes on.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import EnumMeta
from functools import wraps
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from hf_soap.config import options
from hf_soap.engine.optimizer import BlockOptimizer, unwrapped
from hf_soap.optimizers import arguments
from hf_soap.optimizers.names import CALL_AFTER_REGISTERING, ENTRIES, load_entry_points
from hf_soap.trainer import checksums, registry, resume
from hf_soap.trainer.import_hook import after_import

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

BEFORE_TRAINING: list[Callable[[Any], None]] = []
"""Called with each Trainer that is about to make its optimizer; ``hf-soap run`` adds what writes recipes."""

ARGUMENTS = "transformers.training_args"
TRAINER = "transformers.trainer"
SIGTERM = "transformers.trainer_jit_checkpoint"


def install() -> None:
    """Extends transformers, now or as soon as it is imported. Never raises; calling it again changes nothing."""
    if _add_names not in CALL_AFTER_REGISTERING:
        CALL_AFTER_REGISTERING.append(_add_names)
    after_import(ARGUMENTS, _extend_arguments)
    after_import(TRAINER, _extend_trainer)


# ---------------------------------------------------------------------------------------------------------------------
# What takes the place of what
# ---------------------------------------------------------------------------------------------------------------------


def _is_ours(trainer: Any) -> bool:
    """Whether a Trainer trains by an optimizer of this package; before it is made, its name says so."""
    optimizer = unwrapped(trainer.optimizer)
    if optimizer is None:
        return arguments.optimizer_name(trainer.args) in ENTRIES
    return isinstance(optimizer, BlockOptimizer)


def _answer_misspelt(original: Callable[..., Any]) -> Callable[..., Any]:
    def missing(cls: Any, value: object) -> Any:
        if match := options.nearest(str(value).lower(), [member.value for member in cls]):
            raise ValueError(f"unknown optim {value!r}: {match}Valid names are {', '.join(m.value for m in cls)}.")
        return original(value)

    return missing


def _read_then_call(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if arguments.optimizer_name(self) in ENTRIES:
            registry.read_as_from_command_line(self)
        original(self, *args, **kwargs)

    return post_init


def _call_then_read(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def set_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = original(self, *args, **kwargs)
        if arguments.optimizer_name(self) in ENTRIES:
            registry.read_as_from_command_line(self)
        return done

    return set_optimizer


def _make_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: nn.Module | None = None, *others: Any, **named: Any
    ) -> Any:
        # Before the original, not as one of its handlers: it splits optim_args in a way that breaks on brackets.
        if arguments.optimizer_name(args) in ENTRIES:
            return registry.class_and_kwargs(args, model)
        return original(args, model, *others, **named)

    return get_optimizer_cls_and_kwargs


def _attach_then_call(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        from hf_soap.trainer import callbacks  # here: it takes transformers, and names must be registered without

        callbacks.attach(self, every=registry.log_every(self.args))
        for call in BEFORE_TRAINING:
            call(self)
        return original(self, *args, **kwargs)

    return create


def _writing(args: TrainingArguments) -> dict[str, Any]:
    return {"rank": args.process_index, "writers": checksums.writers(args), "common": args.should_save}


def _begin_checksums(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def save_checkpoint(self: Any, model: nn.Module, trial: Any = None, *args: Any, **kwargs: Any) -> None:
        if _is_ours(self):
            folder = Path(self._get_output_dir(trial=trial))
            checksums.begin(folder / f"checkpoint-{self.state.global_step}", **_writing(self.args))
        original(self, model, trial, *args, **kwargs)

    return save_checkpoint


def _write_checksums(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def save_rng_state(self: Any, output_dir: str, *args: Any, **kwargs: Any) -> None:
        original(self, output_dir, *args, **kwargs)  # the last of what all ranks save
        if _is_ours(self):
            checksums.write(Path(output_dir), **_writing(self.args))
            self.accelerator.wait_for_everyone()  # only then does the first rank write what makes it complete

    return save_rng_state


def _choose_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(self):
            resume_from_checkpoint = resume.choose(self, resume_from_checkpoint)
        return original(self, resume_from_checkpoint, *args, **kwargs)

    return train


def _load_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load_optimizer_and_scheduler(self: Any, checkpoint: str | None, *args: Any, **kwargs: Any) -> None:
        if checkpoint is None or not resume.load_optimizer(self, Path(checkpoint)):
            original(self, checkpoint, *args, **kwargs)

    return load_optimizer_and_scheduler


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load_from_checkpoint(
        self: Any, resume_from_checkpoint: str, model: nn.Module | None = None, *args: Any, **kwargs: Any
    ) -> None:
        if not (_is_ours(self) and resume.load_model(self, Path(resume_from_checkpoint), model or self.model)):
            original(self, resume_from_checkpoint, model, *args, **kwargs)

    return load_from_checkpoint


def _unless_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    # Within a step the random numbers of its forward pass are used up, and the resumed run would draw others.
    @wraps(original)
    def event(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.trainer is None or not _is_ours(self.trainer):
            original(self, *args, **kwargs)

    return event


def _save_on_all_ranks(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        manager = self.jit_manager
        if manager and args.world_size > 1 and _is_ours(self.trainer):
            accelerator = self.trainer.accelerator
            asked = torch.tensor(float(manager.is_checkpoint_requested), device=accelerator.device)
            if accelerator.reduce(asked, "sum") == 0:
                return  # a signal that has come meanwhile waits for the next step: this rank would save alone
            manager.is_checkpoint_requested = True
        original(self, args, state, control, **kwargs)

    return on_step_end


def _complete_card(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        from hf_soap.hub import cards  # here: it takes transformers

        cards.write_and_complete(self, original, args, kwargs)

    return create_model_card


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """An attribute of transformers.

    Attributes:
        module: The module that has it.
        path: Its name there, such as ``Trainer.train``.
        parameters: Its first parameters as far as they are relied on; it may have more, which are passed on.
        make: Makes what takes its place. None if it is only called.
        own: Whether its class must have it itself: what a callback inherits does nothing.
    """

    module: str
    path: str
    parameters: tuple[str, ...]
    make: Callable[[Any], Any] | None = None
    own: bool = False

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    def owner(self) -> Any:
        """Returns the class or module that the attribute is looked up on."""
        owner: Any = import_module(self.module)
        for part in self.path.split(".")[:-1]:
            owner = getattr(owner, part)
        return owner

    def problem(self) -> str | None:
        """Says what about the target is not as it is relied on, or None."""
        try:
            owner = self.owner()
        except (ImportError, AttributeError):
            owner = None
        return self.problem_in(owner)

    def problem_in(self, owner: Any) -> str | None:
        """Does what :meth:`problem` does, for the attribute of another class."""
        found = getattr(owner, self.name, None)
        if found is None or (self.own and self.name not in vars(owner)):
            return f"{self.module} has no {self.path}"
        return self._difference(found)

    def replace_in(self, owner: Any) -> Callable[[], None]:
        """Puts the replacement in its place, if it is not there yet.

        Args:
            owner: The class that has the attribute.

        Returns:
            What undoes it.
        """
        original = getattr(owner, self.name)
        if self.make is None or hasattr(original, "hf_soap"):
            return lambda: None
        raw = inspect.getattr_static(owner, self.name)
        new: Any = self.make(original)
        new.hf_soap = True
        inherited = self.name not in vars(owner)
        setattr(owner, self.name, type(raw)(new) if isinstance(raw, (staticmethod, classmethod)) else new)
        return lambda: delattr(owner, self.name) if inherited else setattr(owner, self.name, raw)

    def _difference(self, found: Any) -> str | None:
        try:
            signature = inspect.signature(found)
        except (TypeError, ValueError):
            return f"{self.path} is no function"
        kinds = inspect.Parameter
        names = [p.name for p in signature.parameters.values() if p.kind is kinds.POSITIONAL_OR_KEYWORD]
        passes_on = any(p.kind is kinds.VAR_POSITIONAL for p in signature.parameters.values())  # somebody's wrapper
        known = self.parameters[: len(names)] if passes_on else self.parameters
        if tuple(names[: len(known)]) != known:
            return f"{self.path} takes {signature}, not ({', '.join(self.parameters)})"
        return None


class Names(Target):
    """The enumeration of optimizer names, which gets more members."""

    def replace_in(self, owner: Any) -> Callable[[], None]:
        """Makes the names members."""
        names = getattr(owner, self.name)
        added: list[Any] = []

        def remove() -> None:
            for member in added:
                del names._value2member_map_[member._value_], names._member_map_[member._name_]
                names._member_names_.remove(member._name_)
                type.__delattr__(names, member._name_)

        for value in ENTRIES:
            if value not in names._value2member_map_:
                member = str.__new__(names, value) if issubclass(names, str) else object.__new__(names)
                member._name_, member._value_, member.__objclass__ = value.upper(), value, names
                member._sort_order_ = len(names._member_names_)
                # A pickled member says the plain string: training_args.bin must load where this package is missing.
                member.__reduce_ex__ = lambda proto, value=value: (str, (value,))
                type.__setattr__(names, member._name_, member)
                names._member_names_.append(member._name_)
                names._member_map_[member._name_] = member
                names._value2member_map_[value] = member
                added.append(member)
        if not {*added} <= {*names}:
            remove()
            raise TypeError(f"{self.path} does not list members that are added to it")
        return remove

    def _difference(self, found: Any) -> str | None:
        tables = {"_member_names_": list, "_member_map_": dict, "_value2member_map_": dict}
        fits = isinstance(found, EnumMeta) and all(
            isinstance(getattr(found, table, None), kind) for table, kind in tables.items()
        )
        return None if fits else f"{self.path} is no enumeration that takes more members"


@dataclass(frozen=True)
class Patch:
    """A convenience, and the attributes of transformers that it takes: all are replaced, or none.

    Attributes:
        what: What it is.
        why: Why transformers has to be changed for it.
        without: What its absence means for a user, and what to do.
        targets: What is replaced or called.
        since: The first version of transformers that has all of this. This package has it since 0.1.0.
        option: The option of TrainingArguments that it is about; there is nothing to do where that does not exist.
        by_command: Whether ``hf-soap run`` asks for it, and not ``import hf_soap``.
    """

    what: str
    why: str
    without: str
    targets: tuple[Target, ...]
    since: str = "4.57"
    option: str | None = None
    by_command: bool = False


_EVENT = ("self", "args", "state", "control")

CARDS = Patch(
    "recipes in the model cards that a program writes",
    "cards are written by a method of the Trainer, or of its subclass",
    "cards that the program writes itself have no recipe; recipe.yaml is still written at the end",
    (Target(TRAINER, "Trainer.create_model_card", ("self",), _complete_card),),
    by_command=True,
)

PATCHES = (
    Patch(
        "names of optimizers",
        "TrainingArguments takes members of an enumeration only, and the Trainer makes only those that it knows",
        'optim="soap" and the other names are refused; pass Trainer(optimizers=(hf_soap.SOAP(...), None)) or '
        "Trainer(optimizer_cls_and_kwargs=(hf_soap.SOAP, {...}))",
        (
            Names(ARGUMENTS, "OptimizerNames", ()),
            Target(TRAINER, "Trainer.get_optimizer_cls_and_kwargs", ("args", "model"), _make_ours),
        ),
    ),
    Patch(
        "answers to misspelt names",
        "the error lists all names, not the nearest",
        "a misspelt optim is answered by the list of names alone",
        (Target(ARGUMENTS, "OptimizerNames._missing_", ("value",), _answer_misspelt),),
    ),
    Patch(
        "optim_args and numbers as YAML and JSON have them",
        "arguments keep a mapping, and the text that YAML makes of 3e-3; what reads them later wants what a command "
        "line gives",
        "write optim_args as text, eps=1e-8,beta1=0.9, and learning rates as 3.0e-3",
        (
            Target(ARGUMENTS, "TrainingArguments.__post_init__", ("self",), _read_then_call),
            Target(ARGUMENTS, "TrainingArguments.set_optimizer", ("self", "name"), _call_then_read),
        ),
    ),
    Patch(
        "diagnostics in the log, and recipes of hf-soap run",
        "an optimizer cannot log by itself; every run comes by one of these, also where a subclass has its own other",
        "log_every logs nothing, and hf-soap run writes neither recipe nor card; "
        "SoapTrainer.optimizer_diagnostics() still measures",
        (
            Target(TRAINER, "Trainer.create_optimizer", ("self",), _attach_then_call),
            Target(TRAINER, "Trainer.create_scheduler", ("self",), _attach_then_call),
        ),
    ),
    Patch(
        "checksums of checkpoints",
        "neither torch.load nor safetensors notice a flipped bit, and a folder that is written once more keeps old "
        "files",
        "no checksums are written, and resuming does not notice a changed file; save into an empty output_dir",
        (
            Target(TRAINER, "Trainer._save_checkpoint", ("self", "model", "trial"), _begin_checksums),
            Target(TRAINER, "Trainer._save_rng_state", ("self", "output_dir"), _write_checksums),
            Target(TRAINER, "Trainer._get_output_dir", ("self", "trial")),
        ),
    ),
    Patch(
        "the choice of a complete checkpoint",
        "the Trainer resumes from the newest folder, finished or not",
        "resume_from_checkpoint=True may take a checkpoint that is damaged or was never finished; name the folder",
        (Target(TRAINER, "Trainer.train", ("self", "resume_from_checkpoint"), _choose_checkpoint),),
    ),
    Patch(
        "resuming in another format or on another number of ranks",
        "the Trainer loads what it saved in the same format on as many ranks, and nothing else",
        "resume with the format and on the number of ranks that saved the checkpoint",
        (
            Target(TRAINER, "Trainer._load_optimizer_and_scheduler", ("self", "checkpoint"), _load_optimizer),
            Target(TRAINER, "Trainer._load_from_checkpoint", ("self", "resume_from_checkpoint", "model"), _load_model),
        ),
    ),
    Patch(
        "checkpoints on SIGTERM between two steps",
        "enable_jit_checkpoint saves within a step, on each rank when its own signal comes",
        "a run that enable_jit_checkpoint saved may resume with other random numbers, and hang on several ranks",
        (
            Target(SIGTERM, "JITCheckpointCallback.on_step_begin", _EVENT, _unless_ours, own=True),
            Target(SIGTERM, "JITCheckpointCallback.on_pre_optimizer_step", _EVENT, _unless_ours, own=True),
            Target(SIGTERM, "JITCheckpointCallback.on_epoch_end", _EVENT, _unless_ours, own=True),
            Target(SIGTERM, "JITCheckpointCallback.on_step_end", _EVENT, _save_on_all_ranks, own=True),
        ),
        since="5.0",
        option="enable_jit_checkpoint",
    ),
    CARDS,
)
"""All that this package replaces in transformers."""


def patches_table() -> str:
    """Returns what is replaced as a Markdown table, for the documentation."""
    rows = ["| what for | what is replaced | why | without it | transformers |", "|---|---|---|---|---|"]
    for patch in PATCHES:
        replaced = "<br>".join(f"`{target.module}.{target.path}`" for target in patch.targets if _replaces(target))
        when = " (by `hf-soap run`)" if patch.by_command else ""
        rows.append(f"| {patch.what}{when} | {replaced} | {patch.why} | {patch.without} | {patch.since} |")
    return "\n".join(rows)


def _replaces(target: Target) -> bool:
    return target.make is not None or isinstance(target, Names)


# ---------------------------------------------------------------------------------------------------------------------
# How it is applied
# ---------------------------------------------------------------------------------------------------------------------

_undo: dict[str, list[Callable[[], None]]] = defaultdict(list)
"""For each patch that was applied, what takes it back."""

_left_out: dict[str, str] = {}
"""For each patch that was left out, what about transformers is not as it is relied on."""

_reported: set[str] = set()
"""Patches whose absence was warned about."""


def _extend_arguments(_: ModuleType) -> None:
    load_entry_points()
    for patch in PATCHES:
        _apply(patch, [target for target in patch.targets if target.module == ARGUMENTS])
    if _left_out and TRAINER not in sys.modules:
        # Whoever has only the arguments meets the difference before there is a Trainer. One warning names all.
        try:
            import_module(TRAINER)
        except Exception:
            _report()


def _add_names() -> None:
    """Adds names that were registered after transformers was imported."""
    names = PATCHES[0]
    if names.what in _undo:
        _apply(names, [target for target in names.targets if isinstance(target, Names)])


def _extend_trainer(_: ModuleType) -> None:
    for patch in PATCHES:
        if not patch.by_command:
            _apply(patch, [target for target in patch.targets if target.module != ARGUMENTS])
    _report()


def extend_cards(cls: type) -> None:
    """Has a class of Trainers complete the cards that it writes. Its ancestors may be extended too.

    Args:
        cls: The class of a Trainer; what writes its cards may be its own or inherited. Nothing happens to one that
            completes its cards by itself.
    """
    if getattr(cls, "completes_cards", False):
        return
    (target,) = CARDS.targets
    owner = next((kind for kind in cls.__mro__ if target.name in vars(kind)), None)
    _apply(CARDS, [target], owner)
    _report()


def _apply(patch: Patch, targets: list[Target], owner: Any = None) -> None:
    """Replaces some of the targets of a patch, or takes back all of it."""
    if patch.what in _left_out:
        return
    try:
        if not _concerns(patch):
            return
        problems = [target.problem_in(owner) if owner else target.problem() for target in targets]
        problem = "; ".join(filter(None, problems))
        if not problem:
            for target in targets:
                _undo[patch.what].append(target.replace_in(owner or target.owner()))
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        _left_out[patch.what] = problem
        for undo in reversed(_undo.pop(patch.what, [])):
            undo()


def _concerns(patch: Patch) -> bool:
    if patch.option is None:
        return True
    return patch.option in import_module(ARGUMENTS).TrainingArguments.__dataclass_fields__


def _report() -> None:
    new = [patch for patch in PATCHES if patch.what in _left_out and patch.what not in _reported]
    if new:
        _reported.update(patch.what for patch in new)
        logger.warning(
            "transformers %s is not as this version of hf_soap knows it. Training works, without: %s. Try a newer "
            "hf_soap (pip install -U hf-soap), or a version of transformers that it was tested with.",
            version("transformers"),
            " ".join(
                f"({number}) {patch.what}, since {_left_out[patch.what]}: {patch.without}"
                for number, patch in enumerate(new, start=1)
            ),
        )
