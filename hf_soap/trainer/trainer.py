"""SoapTrainer: the Trainer with the features that an optimizer name alone cannot provide."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_soap.config import options
from hf_soap.distributed import dtensor
from hf_soap.engine.optimizer import BlockOptimizer, unwrapped
from hf_soap.hub import arguments, cards
from hf_soap.optimizers.mars import MARS
from hf_soap.optimizers.names import ENTRIES
from hf_soap.trainer import averaging, metrics, preflight, registry

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class SoapTrainerMixin(_Base):
    """Adds to a Trainer: typed config, early checks, diagnostics, exact MARS, recipes in model cards.

    Put it first: ``class MyTrainer(SoapTrainerMixin, SFTTrainer): ...``.

    Args:
        *args: Positional arguments of the Trainer.
        optimizer_config: The optimizer and its options, instead of ``optim`` and ``optim_args``: a config such as
            ``SoapConfig(precondition_frequency=20)``, or a mapping of options that includes ``"name": "soap"``. The
            name may be omitted if ``optim`` gives it.
        preflight: Whether to check before the first step that gradients and optimizer state fit into the device's
            memory. There is a warning if they do not fit into the free memory, and an error if the state is larger
            than the device.
        **kwargs: Keyword arguments of the Trainer.

    Raises:
        ValueError: If ``optim_args`` or ``optimizer_config`` is wrong, or they contradict each other.
    """

    completes_cards = True
    """Tells ``hf-soap run`` that this Trainer writes recipes and cards itself."""

    def __init__(
        self,
        *args: Any,
        optimizer_config: options.OptimizerConfig | Mapping[str, Any] | None = None,
        preflight: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._window: list[tuple[RandomState, Any]] = []
        if optimizer_config is not None:
            _write_config(self.args, _as_config(self.args, optimizer_config))
        if arguments.optimizer_name(self.args) in ENTRIES:
            arguments.resolve(self.args)  # refuses wrong options before training
            if preflight:
                self.add_callback(_Preflight())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Creates the optimizer as the Trainer does; its state may be distributed over ranks here."""
        token = registry.GATHERS_STATE.set(True)
        try:
            return super().create_optimizer(*args, **kwargs)
        finally:
            registry.GATHERS_STATE.reset(token)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = unwrapped(self.optimizer)
        if isinstance(optimizer, BlockOptimizer) and optimizer.spreads_state() and self.args.save_on_each_node:
            raise ValueError(
                "got save_on_each_node=True with shard_mode='owner' under DDP, wanted one of them: the state is "
                "gathered on rank 0 alone; use FSDP2, or shard_mode='local'"
            )
        with averaging.averages(self):
            if isinstance(optimizer, BlockOptimizer):
                optimizer.consolidate()  # on all ranks: the Trainer calls state_dict on rank 0 only
            super()._save_optimizer_and_scheduler(output_dir)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the Trainer does."""
        self._window.clear()
        return super().train(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the Trainer's card, with optimizer, loss curve, results and recipe; ``push_to_hub`` calls this."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            cards.try_to_complete(self)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Computes the gradients of one batch; for exact MARS, then corrects those of the accumulated batches.

        The correction happens after the last batch of an accumulation window and before clipping. The window is
        replayed at the previous weights with the same random numbers, so that dropout drops the same units. The replay
        changes nothing else.
        """
        optimizer = unwrapped(self.optimizer)
        if not (isinstance(optimizer, MARS) and optimizer.exact):
            return super().training_step(model, inputs, *args, **kwargs)
        self._window.append((_random_state(), copy.copy(inputs)))
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except BaseException:
            self._window.clear()  # such as out of memory: the Trainer starts again with smaller batches
            raise
        if self.accelerator.sync_gradients:
            window = self._window[:] if optimizer.has_previous_weights else []
            self._window.clear()
            with _untraced(self, model), optimizer.at_previous_weights():
                for number, (before, batch) in enumerate(window, start=1):
                    _set_random_state(before)
                    with nullcontext() if number == len(window) else self.accelerator.no_sync(model):
                        super().training_step(model, batch, *args, **kwargs)
        return loss

    def optimizer_diagnostics(self) -> dict[str, float]:
        """Returns :func:`hf_soap.trainer.metrics.diagnostics`; an empty dictionary for other optimizers."""
        optimizer = unwrapped(self.optimizer)
        return metrics.diagnostics(optimizer) if isinstance(optimizer, BlockOptimizer) else {}


RandomState = tuple[Any, Any, Tensor, list[Tensor]]


def _random_state() -> RandomState:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    # Speech models draw masks with numpy, and some models draw layer drop with Python.
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002


def _set_random_state(state: RandomState) -> None:
    python, array, cpu, cuda = state
    random.setstate(python)
    numpy.random.set_state(array)  # noqa: NPY002
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def _untraced(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Restores what a second pass over a batch would count twice: random numbers, buffers, and TRL's metrics."""
    after, notes = _random_state(), ("_metrics", "_total_train_tokens")
    taken = {name: copy.deepcopy(getattr(trainer, name)) for name in notes if hasattr(trainer, name)}
    held = [(module, dict(module._buffers)) for module in model.modules()]
    # Batch norms change buffers without a new version number, so the values are restored.
    values = [(part, part.clone()) for part in map(_memory, model.buffers())]
    try:
        yield
    finally:
        _set_random_state(after)
        vars(trainer).update(taken)
        for module, buffers in held:
            module._buffers.update(buffers)  # restores buffers that a forward pass replaced
        for part, value in values:
            part.copy_(value)


def _memory(buffer: Tensor) -> Tensor:
    """Returns a view of a buffer without its expanded dimensions: torch refuses to copy into those."""
    part = buffer.detach()
    for dim, stride in enumerate(part.stride()):
        if stride == 0 and part.shape[dim] > 1:
            part = part.narrow(dim, 0, 1)
    return part


class SoapTrainer(SoapTrainerMixin, Trainer):
    """The Transformers Trainer with :class:`SoapTrainerMixin`."""


class _Preflight(TrainerCallback):
    """Checks memory when training begins: only then are parameters sharded and owners known."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], unwrapped(kwargs["optimizer"])
        if isinstance(optimizer, BlockOptimizer):
            config, error = arguments.resolve(args), None
            try:
                for warning in preflight.check(model, optimizer, config):
                    logger.warning("optim=%s: %s", config.name, warning)
            except ValueError as caught:
                error = caught
            dtensor.raise_together(error)  # devices may differ, and the other ranks would wait in the first step


def _as_config(args: TrainingArguments, given: Any) -> options.OptimizerConfig:
    if isinstance(given, options.OptimizerConfig):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(
            "optimizer_config must be a config such as hf_soap.SoapConfig(precondition_frequency=20), or a mapping of "
            f"options with a name such as {{'name': 'soap'}}, got {options.shown(given)}"
        )
    named = given.get("name", args.optim)
    name = str(getattr(named, "value", named))
    if name in ENTRIES:
        settings = {key: value for key, value in given.items() if key != "name"}
        return options.parse_optim_args(settings, ENTRIES[name].config)
    if "name" in given:
        match = options.nearest(name, ENTRIES)
        raise ValueError(
            f"optimizer_config names the unknown optimizer {name!r}: {match}Names are {', '.join(ENTRIES)}."
        )
    raise ValueError(
        f"optimizer_config={options.shown(given)} does not name its optimizer, and optim={name!r} is not one of this "
        "package; add 'name': 'soap', or use hf_soap.SoapConfig"
    )


def _write_config(args: TrainingArguments, config: options.OptimizerConfig) -> None:
    """Writes a config into the arguments as text, so that the saved arguments contain it."""
    # Otherwise adam_beta1 would override a config that has the published beta1.
    decided = arguments.changed_adam_arguments(args)
    name, text = arguments.optimizer_name(args), config.to_optim_args(always=decided) or None
    if (name, args.optim_args) == (config.name, text):
        return  # an earlier trainer had the same arguments and config
    if args.optim_args:
        raise ValueError(f"got both optimizer_config and optim_args={args.optim_args!r}, wanted one; drop optim_args")
    if name not in (config.name, next(entry.default for entry in fields(args) if entry.name == "optim")):
        raise ValueError(f"got optim={name!r} with a config of {config.name}, wanted one optimizer; drop optim")
    args.optim = type(args.optim)(config.name) if isinstance(args.optim, Enum) else config.name
    args.optim_args = text
