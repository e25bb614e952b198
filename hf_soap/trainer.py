"""SoapTrainer: the Trainer with what an optimizer name alone cannot bring."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_soap import metrics, registry, resume, schema
from hf_soap.stepping import BlockOptimizer

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class SoapTrainerMixin(_Base):
    """Adds to a Trainer: typed config, early checks, diagnostics, exact MARS, resume past a broken checkpoint.

    Put it first: ``class MyTrainer(SoapTrainerMixin, SFTTrainer): ...``.

    Args:
        *args: Positional arguments of the Trainer.
        optimizer_config: Which optimizer and its options, in place of ``optim`` and ``optim_args``.
        **kwargs: Keyword arguments of the Trainer.

    Raises:
        ValueError: If ``optim_args`` is wrong, or contradicts ``optimizer_config``.
    """

    def __init__(self, *args: Any, optimizer_config: schema.OptimizerConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if optimizer_config is not None:
            _write_config(self.args, optimizer_config)
        if registry.optimizer_name(self.args) in registry.ENTRIES:
            config = registry.resolve(self.args)
            if every := getattr(config, "log_every", 0):
                self.add_callback(_LogDiagnostics(self, every))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as the Trainer does. ``resume_from_checkpoint=True`` passes over incomplete checkpoints.

        Raises:
            ValueError: If no checkpoint is complete.
        """
        if resume_from_checkpoint is True:
            folder = self.args.output_dir or "."
            found = resume.last_complete_checkpoint(folder, model_only=self.args.save_only_model)
            if found is None:
                raise ValueError(
                    f"got resume_from_checkpoint=True, wanted a complete checkpoint in {folder}, found none; "
                    "pass the folder of one, or start without resume_from_checkpoint"
                )
            resume_from_checkpoint = str(found)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def optimizer_diagnostics(self) -> dict[str, float]:
        """Returns what :func:`hf_soap.metrics.diagnostics` measures, or nothing for an optimizer of another kind."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps the prepared one
        return metrics.diagnostics(optimizer) if isinstance(optimizer, BlockOptimizer) else {}


class SoapTrainer(SoapTrainerMixin, Trainer):
    """The Transformers Trainer with :class:`SoapTrainerMixin`."""


class _LogDiagnostics(TrainerCallback):
    def __init__(self, trainer: SoapTrainerMixin, every: int) -> None:
        self.trainer, self.every = trainer, every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0:
            self.trainer.log(self.trainer.optimizer_diagnostics())


def _write_config(args: TrainingArguments, config: schema.OptimizerConfig) -> None:
    """Puts a config into the arguments as text, so that they say on disk what was trained."""
    name = registry.optimizer_name(args)
    if args.optim_args:
        raise ValueError(f"got both optimizer_config and optim_args={args.optim_args!r}, wanted one; drop optim_args")
    if name in registry.ENTRIES and name != config.name:
        raise ValueError(f"got optim={name!r} with a config of {config.name}, wanted one optimizer; drop optim")
    args.optim = type(args.optim)(config.name) if isinstance(args.optim, Enum) else config.name
    args.optim_args = config.to_optim_args() or None
