"""Pretrains or fine-tunes a causal language model with the Hugging Face Trainer and any optimizer it knows.

From scratch on local text, with SOAP and a tokenizer that is trained on the same text:

    python scripts/run_clm.py --train_files 'books/*.txt' --train_tokenizer_vocab 4096 --block_size 256 \
        --model_type gpt2 --config_overrides n_layer=6,n_head=6,n_embd=384 \
        --optim soap --optim_args precondition_frequency=10 --learning_rate 3e-3 --output_dir outputs/books

Fine-tuning with LoRA:

    python scripts/run_clm.py --model_name_or_path gpt2 --lora_r 8 --train_files notes.txt --optim soap ...

All arguments may come from a .yaml or .json file of argument names, given first; the command line overrides it:

    python scripts/run_clm.py recipe.yaml --seed 2

If the output folder has a checkpoint, the run continues from it. It writes a model card and a recipe there.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from _text import LanguageModelTrainer, TextArguments, load_blocks, load_model, load_text, load_tokenizer
from _training import fit, new_config, option, parse, start
from transformers import AutoModelForCausalLM, default_data_collator

logger = logging.getLogger("run_clm")


@dataclass
class ScriptArguments(TextArguments):
    """Arguments for the model, the text and adapters; those for training are in TrainingArguments."""

    lora_r: int = option(0, "Rank of LoRA; 0 trains all weights.")
    lora_alpha: int = option(16, "LoRA scales its update by lora_alpha / lora_r.")
    lora_target_modules: list[str] | None = option(
        None, "Modules that LoRA adapts, or all-linear; by default peft's choice."
    )


def build_model(script: ScriptArguments, tokenizer: Any) -> Any:
    """Returns the model to train: loaded or new, with adapters if LoRA is requested."""
    config = None if script.model_name_or_path else new_config(script)
    model = load_model(script, AutoModelForCausalLM, config, tokenizer)
    if script.lora_r > 0:
        from peft import LoraConfig, get_peft_model

        targets: Any = script.lora_target_modules
        if targets == ["all-linear"]:
            targets = "all-linear"
        lora = LoraConfig(r=script.lora_r, lora_alpha=script.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return model


def collate(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a batch whose labels are its tokens; the model shifts them."""
    batch: dict[str, Any] = default_data_collator(blocks)
    return batch | {"labels": batch["input_ids"].clone()}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, evaluates, saves and writes the model card; returns the metrics of training and evaluation."""
    script, args = parse(ScriptArguments, argv)
    checkpoint = start(args)
    text = load_text(script)
    tokenizer = load_tokenizer(script, args, text, resuming=checkpoint is not None)
    train, held_out = load_blocks(script, args, text, tokenizer)
    model = build_model(script, tokenizer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    blocks = "streamed blocks" if script.streaming else f"{len(train)} blocks"
    logger.info("training %s parameters on %s of %d tokens", f"{trained:,}", blocks, script.block_size)
    trainer = LanguageModelTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=collate,
    )
    return fit(trainer, checkpoint)


if __name__ == "__main__":
    main()
