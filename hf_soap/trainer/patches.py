"""What the Trainer learns: names of optimizers, and saving and resuming them with care."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from hf_soap.engine.optimizer import BlockOptimizer, unwrapped
from hf_soap.optimizers import arguments
from hf_soap.optimizers.names import ENTRIES
from hf_soap.trainer import checksums, registry, resume
from hf_soap.trainer.import_hook import after_import

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments


BEFORE_TRAINING: list[Callable[[Any], None]] = []
"""Called with each Trainer that is about to make its optimizer; ``hf-soap run`` adds what writes recipes."""


def install() -> None:
    """Extends transformers, now or as soon as it is imported. Calling it again changes nothing."""
    after_import("transformers.training_args", registry.add_names)
    after_import("transformers.trainer", _extend_trainer)


def _extend_trainer(trainer: ModuleType) -> None:
    cls = trainer.Trainer
    if not hasattr(cls.get_optimizer_cls_and_kwargs, "hf_soap"):
        _extend_making(cls)
        _extend_saving(cls)
        _extend_loading(cls)
        if find_spec("transformers.trainer_jit_checkpoint"):  # not in transformers 4
            _extend_saving_on_sigterm(import_module("transformers.trainer_jit_checkpoint"))


def _ours(trainer: Any) -> bool:
    """Whether a Trainer trains by an optimizer of this package; before it is made, its name says so."""
    optimizer = unwrapped(trainer.optimizer)
    if optimizer is None:
        return arguments.optimizer_name(trainer.args) in ENTRIES
    return isinstance(optimizer, BlockOptimizer)


def _extend_making(cls: Any) -> None:
    original: Callable[..., Any] = cls.get_optimizer_cls_and_kwargs

    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        # Before the original, not as one of its handlers: it splits optim_args in a way that breaks on brackets.
        if arguments.optimizer_name(args) in ENTRIES:
            return registry.class_and_kwargs(args, model)
        found: tuple[Any, Any] = original(args, model)
        return found

    def attaching(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def attach_and_call(self: Any, *args: Any, **kwargs: Any) -> Any:
            from hf_soap.trainer import callbacks  # here: it takes transformers, and names must be registered without

            callbacks.attach(self, every=registry.log_every(self.args))
            for call in BEFORE_TRAINING:
                call(self)
            return method(self, *args, **kwargs)

        return attach_and_call

    get_optimizer_cls_and_kwargs.hf_soap = True  # type: ignore[attr-defined]
    get_optimizer_cls_and_kwargs.__doc__ = original.__doc__
    cls.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
    # An optimizer cannot log by itself, and every run comes by one of these, also where a subclass has its own other.
    cls.create_optimizer, cls.create_scheduler = attaching(cls.create_optimizer), attaching(cls.create_scheduler)


def _extend_saving(cls: Any) -> None:
    saves, saves_random_state = cls._save_checkpoint, cls._save_rng_state

    @wraps(saves)
    def save_checkpoint(self: Any, model: nn.Module, trial: Any = None) -> None:
        if _ours(self):
            folder = Path(self._get_output_dir(trial=trial))
            checksums.begin(folder / f"checkpoint-{self.state.global_step}", **_writing(self.args))
        saves(self, model, trial)

    @wraps(saves_random_state)
    def save_rng_state(self: Any, output_dir: str) -> None:
        saves_random_state(self, output_dir)  # the last of what all ranks save
        if _ours(self):
            checksums.write(Path(output_dir), **_writing(self.args))
            self.accelerator.wait_for_everyone()  # only then does the first rank write what makes it complete

    cls._save_checkpoint = save_checkpoint
    cls._save_rng_state = save_rng_state


def _writing(args: TrainingArguments) -> dict[str, Any]:
    return {"rank": args.process_index, "writers": checksums.writers(args), "common": args.should_save}


def _extend_loading(cls: Any) -> None:
    trains, loads, loads_model = cls.train, cls._load_optimizer_and_scheduler, cls._load_from_checkpoint

    @wraps(trains)
    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if _ours(self):
            resume_from_checkpoint = resume.choose(self, resume_from_checkpoint)
        return trains(self, resume_from_checkpoint, *args, **kwargs)

    @wraps(loads)
    def load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is None or not resume.load_optimizer(self, Path(checkpoint)):
            loads(self, checkpoint)

    @wraps(loads_model)
    def load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not (_ours(self) and resume.load_model(self, Path(resume_from_checkpoint), model or self.model)):
            loads_model(self, resume_from_checkpoint, model)

    cls.train = train
    cls._load_optimizer_and_scheduler = load_optimizer_and_scheduler
    cls._load_from_checkpoint = load_from_checkpoint


def _extend_saving_on_sigterm(module: ModuleType) -> None:
    """Has ``enable_jit_checkpoint`` save between two steps, and on all ranks at the same one."""
    cls = module.JITCheckpointCallback
    ends_step = cls.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        manager = self.jit_manager
        if manager and args.world_size > 1 and _ours(self.trainer):
            accelerator = self.trainer.accelerator
            asked = torch.tensor(float(manager.is_checkpoint_requested), device=accelerator.device)
            if accelerator.reduce(asked, "sum") == 0:
                return  # a signal that has come meanwhile waits for the next step: this rank would save alone
            manager.is_checkpoint_requested = True
        ends_step(self, args, state, control, **kwargs)

    # Within a step the random numbers of its forward pass are used up, and the resumed run would draw others.
    for name in ("on_step_begin", "on_pre_optimizer_step", "on_epoch_end"):
        setattr(cls, name, _unless_ours(getattr(cls, name)))
    cls.on_step_end = on_step_end


def _unless_ours(event: Callable[..., None]) -> Callable[..., None]:
    @wraps(event)
    def on_event(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.trainer is None or not _ours(self.trainer):
            event(self, *args, **kwargs)

    return on_event
