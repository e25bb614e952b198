"""Trains an encoder on masked tokens with the Hugging Face Trainer and any optimizer it knows.

    python scripts/run_mlm.py --train_files 'books/*.txt' --train_tokenizer_vocab 4096 --block_size 128 \
        --model_type bert --config_overrides hidden_size=256,num_hidden_layers=4,num_attention_heads=4 \
        --optim soap --learning_rate 3e-3 --output_dir outputs/encoder

For arguments from a file, continued runs and the content of the output folder, see run_clm.py. The masks of the text
for evaluation are drawn once, so that losses can be compared between steps, runs and optimizers.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _text import LanguageModelTrainer, TextArguments, load_blocks, load_model, load_text, load_tokenizer
from _training import fit, new_config, option, parse, start
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, default_data_collator

logger = logging.getLogger("run_mlm")

SPECIAL = {"mask_token": "[MASK]", "pad_token": "[PAD]"}


@dataclass
class ScriptArguments(TextArguments):
    """Arguments for the model, the text and its masks; those for training are in TrainingArguments."""

    mlm_probability: float = option(0.15, "Share of the tokens to predict.")


class Masking:
    """Masks blocks that have no labels yet, with new draws each time."""

    def __init__(self, tokenizer: Any, share: float) -> None:
        self.mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=share)

    def __call__(self, blocks: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = default_data_collator(blocks) if "labels" in blocks[0] else self.mask(blocks)
        return batch

    def once(self, held_out: Any) -> Any:
        """Masks a dataset once, with the same draws in every run."""

        def mask(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                masked = self.mask([{"input_ids": ids} for ids in batch["input_ids"]])
            return {name: masked[name].tolist() for name in ("input_ids", "labels")}

        return held_out.map(mask, batched=True)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, evaluates, saves and writes the model card; returns the metrics of training and evaluation."""
    script, args = parse(ScriptArguments, argv)
    checkpoint = start(args)
    text = load_text(script)
    tokenizer = load_tokenizer(script, args, text, resuming=checkpoint is not None, **SPECIAL)
    train, held_out = load_blocks(script, args, text, tokenizer)
    config = None if script.model_name_or_path else new_config(script)
    if config is not None:
        config.pad_token_id = tokenizer.pad_token_id
    model = load_model(script, AutoModelForMaskedLM, config, tokenizer)
    logger.info("training %s parameters on blocks of %d tokens", f"{model.num_parameters():,}", script.block_size)
    masking = Masking(tokenizer, script.mlm_probability)
    trainer = LanguageModelTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=None if held_out is None else masking.once(held_out),
        processing_class=tokenizer,
        data_collator=masking,
    )
    return fit(trainer, checkpoint)


if __name__ == "__main__":
    main()
