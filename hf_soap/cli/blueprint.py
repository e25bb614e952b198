"""A model without weights, and the param groups that the Trainer would make of it."""

from __future__ import annotations

from typing import Any

import torch
import transformers
import typer
from torch import nn


def model_without_weights(
    source: str,
    *,
    model_class: str | None = None,
    dtype: str = "float32",
    lora_r: int | None = None,
    lora_targets: str | None = None,
) -> nn.Module:
    """Builds a model on the meta device from its config.

    Args:
        source: A config.json, a folder with one, or the name of a model on the Hub.
        model_class: A class of transformers; None takes the one that the config names, else the causal language model.
        dtype: Dtype of the weights.
        lora_r: Rank of the LoRA adapters that are trained in place of the weights.
        lora_targets: Regular expression, or ``"all-linear"``, for the layers that get one; None takes peft's choice.

    Returns:
        The model, of which nothing is allocated.

    Raises:
        typer.BadParameter: If there is no such config, class or dtype, or peft knows no layers of this model.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"got {source!r}, wanted a config.json, a folder with one, or the name of a model on the Hub: {error}"
        ) from error
    kind = getattr(torch, dtype, None)
    if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise typer.BadParameter(f"got the dtype {dtype!r}, wanted float32, bfloat16 or float16")
    named = model_class or next(iter(config.architectures or ()), "AutoModelForCausalLM")
    cls: Any = getattr(transformers, named, None)
    if cls is None:
        raise typer.BadParameter(f"transformers has no class {named!r}; name one with --model-class")
    with torch.device("meta"):
        model: nn.Module = (cls.from_config if hasattr(cls, "from_config") else cls)(config)
        model.to(kind)
        return model if lora_r is None else _with_adapters(model, lora_r, lora_targets)


def _with_adapters(model: Any, r: int, targets: str | None) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    try:
        adapted: nn.Module = get_peft_model(model, LoraConfig(r=r, target_modules=targets))
    except ValueError as error:
        raise typer.BadParameter(f"{error} (--lora-targets all-linear takes every linear layer)") from error
    return adapted


def trainer_groups(model: Any) -> list[dict[str, Any]]:
    """Returns the param groups that the Trainer makes: weights that decay, and those that do not."""
    # The method looks at the model alone, and a Trainer would want the model to have weights.
    decaying = set(transformers.Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return [
        # Any decay but none: the argument that says how much is the Trainer's.
        {"params": [param for name, param in trained if name in decaying], "weight_decay": 0.01},
        {"params": [param for name, param in trained if name not in decaying], "weight_decay": 0.0},
    ]
