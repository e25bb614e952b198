"""Everything that this package replaces in transformers, in one table.

Before it is applied, each replacement checks that its target exists and takes the parameters that it relies on. If it
does not, its whole patch is skipped, one warning lists all skipped patches, and training works without them.
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
from hf_soap.hub import arguments
from hf_soap.optimizers.names import CALL_AFTER_REGISTERING, ENTRIES, load_entry_points
from hf_soap.trainer import averaging, checksums, registry, resume
from hf_soap.trainer.import_hook import after_import

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

BEFORE_TRAINING: list[Callable[[Any], None]] = []
"""Called with each Trainer that is about to create its optimizer; ``hf-soap run`` adds a writer of recipes."""

ARGUMENTS = "transformers.training_args"
TRAINER = "transformers.trainer"
SIGTERM = "transformers.trainer_jit_checkpoint"


def install() -> None:
    """Extends transformers, now or as soon as it is imported. Never raises; a second call has no effect."""
    if _add_names not in CALL_AFTER_REGISTERING:
        CALL_AFTER_REGISTERING.append(_add_names)
    after_import(ARGUMENTS, _extend_arguments)
    after_import(TRAINER, _extend_trainer)


# ---------------------------------------------------------------------------------------------------------------------
# The replacements
# ---------------------------------------------------------------------------------------------------------------------


def _is_ours(trainer: Any) -> bool:
    """Whether a Trainer uses an optimizer of this package; before it is created, `optim` decides."""
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
        # Before the original, which splits optim_args in a way that breaks on brackets.
        if arguments.optimizer_name(args) in ENTRIES:
            return registry.class_and_kwargs(args, model)
        return original(args, model, *others, **named)

    return get_optimizer_cls_and_kwargs


def _attach_then_call(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        from hf_soap.trainer import callbacks  # here: it imports transformers, and names must be registered without it

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
            self.accelerator.wait_for_everyone()  # the first rank then writes the file that marks it as complete

    return save_rng_state


def _tell_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def get_grad_norm(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        norm = original(self, model, *args, **kwargs)
        if norm is not None and _is_ours(self) and _steps_with_clipped_gradients(self):
            unwrapped(self.optimizer).know_grad_norm(model.parameters(), norm)
        return norm

    return get_grad_norm


def _steps_with_clipped_gradients(trainer: Any) -> bool:
    """Whether transformers clips all gradients together, and no callback may change them before the step.

    A subclass may clip only some of them. A change through ``grad.data`` or numpy could not be noticed.
    """
    events = [type(callback).on_pre_optimizer_step for callback in trainer.callback_handler.callbacks]
    known = [type(trainer)._clip_grad_norm, *events]
    return all(method.__module__.partition(".")[0] in ("transformers", "hf_soap") for method in known)


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


def _on_averages(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with averaging.averages(self):
            return original(self, *args, **kwargs)

    return call


def _load_best_average(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load_best_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        averaging.restart(self.optimizer)

    return load_best_model


def _unless_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    # Within a step, its forward pass has drawn random numbers already, and the resumed run would draw others.
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
                return  # a signal that arrives now waits for the next step: otherwise this rank would save alone
            manager.is_checkpoint_requested = True
        original(self, args, state, control, **kwargs)

    return on_step_end


def _complete_card(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        from hf_soap.hub import cards  # here: it imports transformers

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
        parameters: Its first parameters, on which the replacement relies; others are passed on.
        make: Creates the replacement. None if the attribute is only called.
        own: Whether its class must define it itself: the methods that a callback inherits do nothing.
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
        """Returns the class or module that has the attribute."""
        owner: Any = import_module(self.module)
        for part in self.path.split(".")[:-1]:
            owner = getattr(owner, part)
        return owner

    def problem(self) -> str | None:
        """Says how the target differs from what the replacement relies on; returns None if it does not."""
        try:
            owner = self.owner()
        except (ImportError, AttributeError):
            owner = None
        return self.problem_in(owner)

    def problem_in(self, owner: Any) -> str | None:
        """Does what :meth:`problem` does, for the attribute of a given class."""
        found = getattr(owner, self.name, None)
        if found is None or (self.own and self.name not in vars(owner)):
            return f"{self.module} has no {self.path}"
        return self._difference(found)

    def replace_in(self, owner: Any) -> Callable[[], None]:
        """Replaces the attribute, unless that was done before.

        Args:
            owner: The class that has the attribute.

        Returns:
            A function that undoes the replacement.
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
            return f"{self.path} is not a function"
        kinds = inspect.Parameter
        names = [p.name for p in signature.parameters.values() if p.kind is kinds.POSITIONAL_OR_KEYWORD]
        passes_on = any(
            p.kind is kinds.VAR_POSITIONAL for p in signature.parameters.values()
        )  # another package's wrapper
        known = self.parameters[: len(names)] if passes_on else self.parameters
        if tuple(names[: len(known)]) != known:
            return f"{self.path} takes {signature}, not ({', '.join(self.parameters)})"
        return None


class Names(Target):
    """The enumeration of optimizer names, to which members are added."""

    def replace_in(self, owner: Any) -> Callable[[], None]:
        """Adds the names as members."""
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
                # A member pickles as a plain string, so that training_args.bin loads without this package.
                member.__reduce_ex__ = lambda proto, value=value: (str, (value,))
                type.__setattr__(names, member._name_, member)
                names._member_names_.append(member._name_)
                names._member_map_[member._name_] = member
                names._value2member_map_[value] = member
                added.append(member)
        if not {*added} <= {*names}:
            remove()
            raise TypeError(f"{self.path} does not list the members that were added to it")
        return remove

    def _difference(self, found: Any) -> str | None:
        tables = {"_member_names_": list, "_member_map_": dict, "_value2member_map_": dict}
        fits = isinstance(found, EnumMeta) and all(
            isinstance(getattr(found, table, None), kind) for table, kind in tables.items()
        )
        return None if fits else f"{self.path} is not an enumeration to which members can be added"


@dataclass(frozen=True)
class Patch:
    """A feature, and the attributes of transformers that it needs: all are replaced, or none.

    Attributes:
        what: The feature.
        why: Why it needs changes in transformers.
        without: What users lose without it, and what to do.
        targets: The attributes that are replaced or called.
        since: The first version of transformers that has all targets. This package has the feature since 0.1.0.
        option: The option of TrainingArguments that the feature is for; without that option, nothing is replaced.
        by_command: Whether ``hf-soap run`` applies it, and not ``import hf_soap``.
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
    "a method of the Trainer, or of its subclass, writes the cards",
    "cards that the program writes itself have no recipe; recipe.yaml is still written at the end",
    (Target(TRAINER, "Trainer.create_model_card", ("self",), _complete_card),),
    by_command=True,
)

PATCHES = (
    Patch(
        "names of optimizers",
        "TrainingArguments accepts only members of an enumeration, and the Trainer only creates optimizers it knows",
        'optim="soap" and the other names are refused; pass Trainer(optimizers=(hf_soap.SOAP(...), None)) or '
        "Trainer(optimizer_cls_and_kwargs=(hf_soap.SOAP, {...}))",
        (
            Names(ARGUMENTS, "OptimizerNames", ()),
            Target(TRAINER, "Trainer.get_optimizer_cls_and_kwargs", ("args", "model"), _make_ours),
        ),
    ),
    Patch(
        "the nearest name for a misspelt one",
        "the error lists all names and does not name the nearest",
        "the error for a misspelt optim only lists the names",
        (Target(ARGUMENTS, "OptimizerNames._missing_", ("value",), _answer_misspelt),),
    ),
    Patch(
        "optim_args and numbers from YAML and JSON",
        "the arguments keep a mapping as a mapping, and 3e-3, which YAML reads as text, as text; the code that reads "
        "them later expects the types of a command line",
        "write optim_args as text, eps=1e-8,beta1=0.9, and learning rates as 3.0e-3",
        (
            Target(ARGUMENTS, "TrainingArguments.__post_init__", ("self",), _read_then_call),
            Target(ARGUMENTS, "TrainingArguments.set_optimizer", ("self", "name"), _call_then_read),
        ),
    ),
    Patch(
        "diagnostics in the log, and recipes of hf-soap run",
        "an optimizer cannot log by itself; every run calls one of these, even if a subclass replaces the other",
        "log_every logs nothing, and hf-soap run writes neither recipe nor card; "
        "SoapTrainer.optimizer_diagnostics() still measures",
        (
            Target(TRAINER, "Trainer.create_optimizer", ("self",), _attach_then_call),
            Target(TRAINER, "Trainer.create_scheduler", ("self",), _attach_then_call),
        ),
    ),
    Patch(
        "one look at the gradients instead of two",
        "gradient clipping computes the norm of the gradients, which shows whether they are finite",
        "the optimizer checks the gradients itself, which is a tenth of a step of MARS",
        (
            Target(TRAINER, "Trainer._get_grad_norm", ("self", "model"), _tell_optimizer),
            Target(TRAINER, "Trainer._clip_grad_norm", ("self", "model")),
        ),
        since="5.10",
    ),
    Patch(
        "checksums of checkpoints",
        "neither torch.load nor safetensors detects a flipped bit, and a folder that is overwritten keeps old files",
        "no checksums are written, and resuming does not detect a changed file; save into an empty output_dir",
        (
            Target(TRAINER, "Trainer._save_checkpoint", ("self", "model", "trial"), _begin_checksums),
            Target(TRAINER, "Trainer._save_rng_state", ("self", "output_dir"), _write_checksums),
            Target(TRAINER, "Trainer._get_output_dir", ("self", "trial")),
        ),
    ),
    Patch(
        "the choice of a complete checkpoint",
        "the Trainer resumes from the newest folder, complete or not",
        "resume_from_checkpoint=True may choose a damaged or incomplete checkpoint; name the folder",
        (Target(TRAINER, "Trainer.train", ("self", "resume_from_checkpoint"), _choose_checkpoint),),
    ),
    Patch(
        "resuming in another format or on another number of ranks",
        "the Trainer loads only what it saved in the same format on the same number of ranks",
        "resume with the format and the number of ranks that saved the checkpoint",
        (
            Target(TRAINER, "Trainer._load_optimizer_and_scheduler", ("self", "checkpoint"), _load_optimizer),
            Target(TRAINER, "Trainer._load_from_checkpoint", ("self", "resume_from_checkpoint", "model"), _load_model),
        ),
    ),
    Patch(
        "averages of the weights in evaluation and in what is saved",
        "the Trainer exchanges averages and weights for evaluation, but saves whichever the model holds, and keeps "
        "what FSDP2 has gathered of the others",
        "with average_horizon, call trainer.optimizer.eval() before you save the model; no checkpoint is sure to have "
        "the averages",
        (
            Target(TRAINER, "Trainer.evaluation_loop", ("self", "dataloader"), _on_averages),
            Target(TRAINER, "Trainer.save_model", ("self",), _on_averages),
            Target(TRAINER, "Trainer._save_optimizer_and_scheduler", ("self", "output_dir"), _on_averages),
            Target(TRAINER, "Trainer._load_best_model", ("self",), _load_best_average),
        ),
    ),
    Patch(
        "checkpoints on SIGTERM between two steps",
        "enable_jit_checkpoint saves within a step, and on each rank when its own signal arrives",
        "a checkpoint of enable_jit_checkpoint may resume with different random numbers, and several ranks may hang",
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
"""Everything that this package replaces in transformers."""


def patches_table() -> str:
    """Returns a Markdown table of the patches, for the documentation."""
    rows = ["| what for | what is replaced | why | without it | transformers |", "|---|---|---|---|---|"]
    for patch in PATCHES:
        replaced = "<br>".join(f"`{target.module}.{target.path}`" for target in patch.targets if _replaces(target))
        when = " (by `hf-soap run`)" if patch.by_command else ""
        rows.append(f"| {patch.what}{when} | {replaced} | {patch.why} | {patch.without} | {patch.since} |")
    return "\n".join(rows)


def _replaces(target: Target) -> bool:
    return target.make is not None or isinstance(target, Names)


# ---------------------------------------------------------------------------------------------------------------------
# Applying the patches
# ---------------------------------------------------------------------------------------------------------------------

_undo: dict[str, list[Callable[[], None]]] = defaultdict(list)
"""For each applied patch, the functions that undo it."""

_skipped: dict[str, str] = {}
"""For each skipped patch, how transformers differs from what it relies on."""

_reported: set[str] = set()
"""Skipped patches that a warning has named."""


def _extend_arguments(_: ModuleType) -> None:
    load_entry_points()
    for patch in PATCHES:
        _apply(patch, [target for target in patch.targets if target.module == ARGUMENTS])
    if _skipped and TRAINER not in sys.modules:
        # A program may import the arguments long before the Trainer. Importing it now gives one warning for all.
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
    """Makes a class of Trainers complete the cards that it writes. Its parent classes may be extended too.

    Args:
        cls: The class of a Trainer; the method that writes its cards may be its own or inherited. A class that
            completes its own cards is left unchanged.
    """
    if getattr(cls, "completes_cards", False):
        return
    (target,) = CARDS.targets
    owner = next((kind for kind in cls.__mro__ if target.name in vars(kind)), None)
    _apply(CARDS, [target], owner)
    _report()


def _apply(patch: Patch, targets: list[Target], owner: Any = None) -> None:
    """Replaces some of the targets of a patch; if that fails, undoes the whole patch."""
    if patch.what in _skipped:
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
        _skipped[patch.what] = problem
        for undo in reversed(_undo.pop(patch.what, [])):
            undo()


def _concerns(patch: Patch) -> bool:
    if patch.option is None:
        return True
    return patch.option in import_module(ARGUMENTS).TrainingArguments.__dataclass_fields__


def _report() -> None:
    new = [patch for patch in PATCHES if patch.what in _skipped and patch.what not in _reported]
    if new:
        _reported.update(patch.what for patch in new)
        logger.warning(
            "transformers %s differs from the versions that this hf_soap supports. Training works, without: %s. Try a "
            "newer hf_soap (pip install -U hf-soap), or a version of transformers that it was tested with.",
            version("transformers"),
            " ".join(
                f"({number}) {patch.what}, because {_skipped[patch.what]}: {patch.without}"
                for number, patch in enumerate(new, start=1)
            ),
        )
