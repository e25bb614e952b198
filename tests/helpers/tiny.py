"""A model, data and arguments small enough to train in a second."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainingArguments

VOCABULARY = 64

TRANSFORMERS_4 = version("transformers").startswith("4.")


def gpt2(**config: Any) -> GPT2LMHeadModel:
    """Two layers of width 32 with dropout, so that a resumed run must restore the random state too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **config}))


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count upwards from anywhere by one or two.

    Args:
        rows: How many.
    """

    def __init__(self, rows: int = 64) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + torch.arange(12) * (1 + index % 2)) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each number, and the two special tokens that trl asks for."""
    words = {str(number): number for number in range(VOCABULARY - 2)}
    words |= {"<eos>": VOCABULARY - 2, "<unk>": VOCABULARY - 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), eos_token="<eos>", pad_token="<eos>"
    )


def arguments(folder: Path | str, cls: type[TrainingArguments] = TrainingArguments, **changes: Any) -> Any:
    """Arguments for a silent run of eight steps on the CPU by `soap`."""
    settings = {
        "output_dir": str(folder),
        "optim": "soap",
        "learning_rate": 3e-3,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return cls(**{**settings, **changes})


def sft_trainer(
    folder: Path | str, *mixins: type, model: Any = None, extra: dict[str, Any] | None = None, **changes: Any
) -> Any:
    """TRL's trainer on the same numbers; skips where TRL is not installed.

    Args:
        folder: For its output.
        mixins: Classes that go in front of SFTTrainer.
        model: In place of a tiny GPT-2.
        extra: More arguments of the trainer.
        changes: More training arguments.
    """
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    known = {"bf16": False, "gradient_checkpointing": False, "activation_checkpointing": False, "max_length": 16}
    known = {key: value for key, value in known.items() if key in trl.SFTConfig.__dataclass_fields__}
    numbers = Counting()
    rows = {"input_ids": [numbers[i]["input_ids"].tolist() for i in range(len(numbers))]}
    return type("Mixed", (*mixins, trl.SFTTrainer), {})(
        model or gpt2(),
        arguments(folder, trl.SFTConfig, **known, **changes),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
        **(extra or {}),
    )
