"""Callbacks of any Trainer: optimizer diagnostics in its log, and averages of the weights after training."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_soap.engine.optimizer import BlockOptimizer, unwrapped
from hf_soap.engine.profiling import StepProfiler
from hf_soap.trainer import averaging, metrics

logger = logging.getLogger(__name__)


class SoapMetricsCallback(TrainerCallback):
    """Writes the diagnostics of an optimizer of this package to the log of a Trainer.

    ``optim_args="log_every=50"`` adds one. Add it by hand for an optimizer that your program creates:
    ``Trainer(..., callbacks=[SoapMetricsCallback(every=50)], optimizers=(SOAP(...), None))``. Refreshes are measured
    in every step, updates only in the steps that are logged.

    Args:
        every: Steps between two log entries.

    Raises:
        ValueError: If ``every`` is below 1.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}; omit the callback to log nothing")
        self.every = every
        self._trainer: weakref.ref[Trainer] | None = None
        self._warned = False

    @property
    def trainer(self) -> Trainer | None:
        """The trainer of this callback. The reference is weak, so that a deleted trainer is freed."""
        return None if self._trainer is None else self._trainer()

    @trainer.setter
    def trainer(self, trainer: Trainer) -> None:
        self._trainer = weakref.ref(trainer)

    def __getstate__(self) -> dict[str, Any]:
        """Omits the trainer; :func:`attach` sets it before training."""
        return {**vars(self), "_trainer": None}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the optimizer a profiler, and tells it whether the coming step will be logged."""
        optimizer = self._optimizer()
        if isinstance(optimizer, BlockOptimizer):
            optimizer.profiler = optimizer.profiler or StepProfiler()
            optimizer.profiler.due = (state.global_step + 1) % self.every == 0
        elif not self._warned:
            self._warned = True
            logger.warning(
                "SoapMetricsCallback got %s, wanted a Trainer with an optimizer of hf_soap; it logs nothing",
                type(optimizer).__name__,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs the diagnostics, on all ranks."""
        optimizer = self._optimizer()
        measured = isinstance(optimizer, BlockOptimizer) and optimizer.profiler is not None
        trainer = self.trainer
        if trainer is not None and measured and state.global_step % self.every == 0:
            due = control.should_log
            trainer.log(metrics.measurements(optimizer))
            control.should_log = due  # logging clears this flag, and the loss of this step would not be logged

    def _optimizer(self) -> Any:
        return None if self.trainer is None else unwrapped(self.trainer.optimizer)


class _ByOption(SoapMetricsCallback):
    """The callback that ``log_every`` adds; it is removed when the option is."""


class AverageCallback(TrainerCallback):
    """Puts the averages of the weights into the model after training, and the raw weights before it goes on."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts back the raw weights that an earlier training ended with."""
        averaging.exchange(kwargs["model"], kwargs["optimizer"], average=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Exchanges weights and averages, if the optimizer keeps averages."""
        averaging.exchange(kwargs["model"], kwargs["optimizer"], average=True)


def attach(trainer: Trainer, *, every: int) -> None:
    """Adds the callbacks that a trainer lacks, and sets the trainer of its :class:`SoapMetricsCallback`.

    Args:
        trainer: Any trainer that is about to train.
        every: Steps between two entries of the callback that is added. 0 adds none, and removes one that was added
            for another value.
    """
    # At the first call, an existing optimizer was passed in; the model card must not say that `optim` created it.
    vars(trainer).setdefault("_given_optimizer", trainer.optimizer is not None)
    vars(trainer).setdefault("_given_scheduler", trainer.lr_scheduler is not None)
    callbacks = trainer.callback_handler.callbacks
    if not any(isinstance(one, AverageCallback) for one in callbacks):
        callbacks.insert(0, AverageCallback())  # before those that publish the model
    present = [one for one in callbacks if isinstance(one, SoapMetricsCallback)]
    for outdated in [one for one in present if isinstance(one, _ByOption) and one.every != every]:
        trainer.remove_callback(outdated)
        present.remove(outdated)
    if every and not present:
        present = [_ByOption(every)]
        trainer.add_callback(present[0])
    for callback in present:
        callback.trainer = trainer
