"""Shared code of the training scripts: arguments, a new model's config, and the run from start to model card."""

import difflib
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_soap.cli.compare.training import Clock, state_bytes
from hf_soap.config import plain_yaml
from hf_soap.hub.safety import PROVENANCE
from hf_soap.trainer.resume import last_complete_checkpoint

logger = logging.getLogger(__name__)


def option(default: Any, help: str) -> Any:
    """Declares an argument of a script, with its help."""
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """Arguments for the model; those for training are in TrainingArguments."""

    model_name_or_path: str | None = option(None, "Model to fine-tune: a folder or a name on the Hub.")
    model_type: str | None = option(None, "Architecture to train from scratch, such as gpt2.")
    config_name: str | None = option(None, "Configuration to train from scratch: a folder or a name on the Hub.")
    config_overrides: str | None = option(None, "Changes to a new model's configuration: n_layer=4,n_embd=256,...")
    dtype: str = option("float32", "Dtype of the weights; with --bf16 they keep it, and arithmetic is in bfloat16.")

    def __post_init__(self) -> None:
        if sum(name is not None for name in (self.model_name_or_path, self.model_type, self.config_name)) != 1:
            raise ValueError(
                f"wanted one of model_name_or_path, model_type and config_name, got {self.model_name_or_path!r}, "
                f"{self.model_type!r} and {self.config_name!r}; use --model_type to train from scratch"
            )


def parse(arguments: type[Any], argv: Sequence[str] | None) -> tuple[Any, TrainingArguments]:
    """Reads a command line.

    Args:
        arguments: The script's dataclass of arguments.
        argv: The arguments after the script's name; None reads them from ``sys.argv``. If the first ends in .yaml,
            .yml or .json, it is a file of defaults.

    Returns:
        The script's arguments and the Trainer's.

    Raises:
        ValueError: If the file names an argument that does not exist.
    """
    parser = HfArgumentParser((arguments, TrainingArguments))
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        config = argv.pop(0)
        defaults = plain_yaml.load(Path(config).read_bytes()) or {}  # JSON is YAML as well
        defaults.pop(PROVENANCE, None)
        known = {action.dest: action for action in parser._actions}
        for name, value in defaults.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; use {near[0]!r}" if near else "; --help lists them"
                raise ValueError(f"unknown argument {name!r} in {config}{hint}")
            if known[name].nargs == "+" and not isinstance(value, list):
                defaults[name] = [value]
        # argparse converts defaults that are text, so that 1e-3 becomes a number even if YAML reads it as text.
        parser.set_defaults(**defaults)
    script, training = parser.parse_args_into_dataclasses(args=argv)
    return script, training


def start(args: TrainingArguments) -> Path | None:
    """Sets up logging and the seed; returns the checkpoint to continue from, if the output folder has one."""
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.WARNING)
    set_seed(args.seed)
    if args.resume_from_checkpoint is not None:
        return Path(args.resume_from_checkpoint)
    if not Path(args.output_dir).is_dir():
        return None
    checkpoint = last_complete_checkpoint(args.output_dir)
    if checkpoint is not None:
        logger.info("continuing from %s; use another --output_dir to start from scratch", checkpoint)
    return None if checkpoint is None else Path(checkpoint)


def new_config(script: ModelArguments) -> Any:
    """Returns the config of a model from scratch."""
    if script.config_name:
        config = AutoConfig.from_pretrained(script.config_name)
    elif script.model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[script.model_type]()
    else:
        near = difflib.get_close_matches(str(script.model_type), CONFIG_MAPPING.keys(), n=1)
        raise ValueError(f"unknown model_type {script.model_type!r}; use {near[0] if near else 'gpt2'!r}")
    if script.config_overrides:
        config.update_from_string(script.config_overrides)
    return config


class _CpuClock(Clock):
    """A class of its own, since the Trainer warns of two callbacks of one class."""


def fit(trainer: Trainer, checkpoint: Path | None) -> dict[str, float]:
    """Trains, evaluates, saves, and writes the model card.

    Args:
        trainer: The trainer; the model is evaluated at the end if it has data for that.
        checkpoint: The folder to continue from.

    Returns:
        The metrics of training and evaluation. Those of training include the cost of the optimizer: seconds of its
        steps and of whole steps, as wall time and as CPU time of this process, and bytes of state per trained
        parameter.
    """
    clocks = {"seconds": Clock(), "cpu_seconds": _CpuClock(now=time.process_time)}
    for clock in clocks.values():
        trainer.add_callback(clock)
    results = {"train": trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics}
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    results["train"]["train_state_bytes_per_parameter"] = round(state_bytes(trainer.optimizer) / trained, 2)
    for unit, clock in clocks.items():
        results["train"][f"train_step_{unit}"] = round(clock.seconds, 2)
        results["train"][f"train_optimizer_{unit}"] = round(clock.optimizer_seconds, 2)
    trainer.save_model()
    if trainer.eval_dataset is not None:
        results["eval"] = trainer.evaluate()
    trainer.save_state()
    for split, metrics in results.items():
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    return results["train"] | results.get("eval", {})
