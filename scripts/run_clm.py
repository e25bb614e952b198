"""Pretrains or fine-tunes a causal language model with the Hugging Face Trainer and any optimizer it knows.

From scratch on local text, with SOAP and a tokenizer trained on the spot:

    python scripts/run_clm.py --train_files 'books/*.txt' --train_tokenizer_vocab 4096 --block_size 256 \
        --model_type gpt2 --config_overrides n_layer=6,n_head=6,n_embd=384 \
        --optim soap --optim_args precondition_frequency=10 --learning_rate 3e-3 --output_dir outputs/books

Fine-tuning with LoRA:

    python scripts/run_clm.py --model_name_or_path gpt2 --lora_r 8 --train_files notes.txt --optim soap ...

All arguments may come from a .yaml or .json file of argument names, given first; the command line overrides it:

    python scripts/run_clm.py recipe.yaml --seed 2

A run whose output folder holds a checkpoint continues from it. It leaves a model card and a recipe there.
"""

import difflib
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from datasets import load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_soap import SoapTrainer
from hf_soap.resume import last_complete_checkpoint

logger = logging.getLogger("run_clm")

END_OF_TEXT = "<|endoftext|>"
SHUFFLE_BUFFER = 1_000
TOKENIZER_ROWS = 1_000_000  # a stream may have no end


def option(default: Any, help: str) -> Any:
    """A field of ScriptArguments with its help for the command line."""
    return field(default=default, metadata={"help": help})


@dataclass
class ScriptArguments:
    """Which model and which text; everything about training is in TrainingArguments."""

    model_name_or_path: str | None = option(None, "Model to fine-tune: a folder or a name on the Hub.")
    model_type: str | None = option(None, "Architecture to train from scratch, such as gpt2.")
    config_name: str | None = option(None, "Configuration to train from scratch: a folder or a name on the Hub.")
    config_overrides: str | None = option(None, "Changes to a new model's configuration: n_layer=4,n_embd=256,...")
    dtype: str = option("float32", "Of the weights; with --bf16 they stay in it while the arithmetic is bfloat16.")
    tokenizer_name: str | None = option(None, "Tokenizer, where it is not the model's own.")
    train_tokenizer_vocab: int | None = option(None, "Train a byte-level BPE of this size on the training text.")
    lora_r: int = option(0, "Rank of LoRA; 0 trains all weights.")
    lora_alpha: int = option(16, "LoRA scales its update by lora_alpha / lora_r.")
    lora_target_modules: list[str] | None = option(None, "Modules that LoRA adapts, or all-linear; model's default.")
    train_files: list[str] | None = option(None, "Text files or glob patterns to train on.")
    eval_files: list[str] | None = option(None, "Text files or glob patterns to evaluate on.")
    dataset_name: str | None = option(None, "A dataset for datasets.load_dataset, instead of files.")
    dataset_config: str | None = option(None, "Its configuration.")
    eval_split: str | None = option(None, "Its split to evaluate on.")
    text_column: str = option("text", "Its column of text.")
    block_size: int = option(512, "Tokens of one sequence.")
    streaming: bool = option(False, "Read the text as training asks for it; needs --max_steps.")
    eval_share: float = option(0.05, "Share of the blocks held out, from the end, where no text to evaluate is named.")
    eval_blocks: int | None = option(None, "Evaluate on at most these; streaming holds out this many at the start.")

    def __post_init__(self) -> None:
        if (self.train_files is None) == (self.dataset_name is None):
            got = "neither" if self.train_files is None else "both"
            raise ValueError(
                f"wanted one source of text, got {got}; use --train_files 'folder/*.txt' or --dataset_name NAME"
            )
        if sum(name is not None for name in (self.model_name_or_path, self.model_type, self.config_name)) != 1:
            raise ValueError(
                f"wanted one of model_name_or_path, model_type and config_name, got {self.model_name_or_path!r}, "
                f"{self.model_type!r} and {self.config_name!r}; use --model_type gpt2 to train from scratch"
            )
        if not (self.model_name_or_path or self.tokenizer_name or self.train_tokenizer_vocab or self.config_name):
            raise ValueError(
                "a model from scratch needs a tokenizer, got none; use --train_tokenizer_vocab 4096 to train one on "
                "the text, or --tokenizer_name FOLDER"
            )


class ClmTrainer(SoapTrainer):
    """Reports perplexity with each evaluation."""

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss = output.metrics.get(f"{metric_key_prefix}_loss")
        if loss is not None:
            # exp overflows a float from 710 on; a diverged run should report that, not crash.
            output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(loss) if loss < 700 else math.inf
        return output


def parse(argv: Sequence[str]) -> tuple[ScriptArguments, TrainingArguments]:
    """Reads the command line; a first argument that ends in .yaml, .yml or .json names a file of defaults."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    argv = list(argv)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        config = argv.pop(0)
        defaults = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}  # JSON is YAML as well
        known = {action.dest for action in parser._actions}
        for name in defaults:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; use {near[0]!r}" if near else "; --help lists them"
                raise ValueError(f"unknown argument {name!r} in {config}{hint}")
        # argparse converts defaults that are strings, so that 1e-3, a string to YAML, becomes a number.
        parser.set_defaults(**defaults)
    script, training = parser.parse_args_into_dataclasses(args=argv)
    return script, training


def expand(patterns: Iterable[str]) -> list[str]:
    """Files that the patterns match, in sorted order."""
    files: list[str] = []
    for pattern in patterns:
        matches = sorted(glob(pattern, recursive=True))
        if not matches:
            raise ValueError(f"no file matches {pattern!r}; name text files, or a pattern such as 'data/**/*.txt'")
        files += matches
    return files


def load_text(script: ScriptArguments, *, evaluation: bool = False) -> Any:
    """The raw rows of text, or None where no text for evaluation is named."""
    if script.dataset_name:
        split = script.eval_split if evaluation else "train"
        if split is None:
            return None
        return load_dataset(script.dataset_name, script.dataset_config, split=split, streaming=script.streaming)
    patterns = script.eval_files if evaluation else script.train_files
    if not patterns:
        return None
    # Rows are lines, with their ends kept, so that packing restores the files as they were.
    return load_dataset(
        "text", data_files=expand(patterns), keep_linebreaks=True, split="train", streaming=script.streaming
    )


def train_tokenizer(texts: Iterator[str], *, vocab_size: int, folder: Path) -> None:
    """Trains a byte-level BPE, whose only special token ends a text, and saves it in ``folder``."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    tokenizer.save_pretrained(folder)


def load_tokenizer(script: ScriptArguments, args: TrainingArguments, texts: Any, *, resuming: bool) -> Any:
    """The tokenizer that is named, or one trained on the text by the first process and read by all."""
    if script.train_tokenizer_vocab is None:
        return AutoTokenizer.from_pretrained(script.tokenizer_name or script.model_name_or_path or script.config_name)
    folder = Path(args.output_dir) / "tokenizer"
    with args.main_process_first(local=False, desc="training the tokenizer"):
        if args.process_index == 0 and not (resuming and folder.exists()):
            rows = (row[script.text_column] for row in islice(texts, TOKENIZER_ROWS))
            train_tokenizer(rows, vocab_size=script.train_tokenizer_vocab, folder=folder)
    return AutoTokenizer.from_pretrained(folder)


def pack(dataset: Any, tokenizer: Any, *, column: str, block_size: int, documents: bool) -> Any:
    """Concatenates the rows and cuts them into blocks of ``block_size`` tokens.

    Args:
        dataset: Rows of text, in memory or streamed.
        tokenizer: Makes token ids of them.
        column: The column of text.
        block_size: Tokens of one block.
        documents: Rows are texts of their own and end with the end-of-text token; otherwise they are lines of a text.

    Returns:
        A dataset of ``input_ids`` and ``labels``, each of block_size ids. Tokens that fill no block are dropped.
    """
    end = [tokenizer.eos_token_id] if documents and tokenizer.eos_token_id is not None else []

    def to_blocks(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        rows = tokenizer(batch[column], add_special_tokens=False)["input_ids"]
        ids = [token for row in rows for token in row + end]
        blocks = [ids[start : start + block_size] for start in range(0, len(ids) - block_size + 1, block_size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    # A batch drops what fills no block at its end: batches of many lines, or of fewer but longer documents.
    batch_size = 1_000 if documents else 20_000
    rows = dataset.select_columns([column])
    return rows.map(to_blocks, batched=True, batch_size=batch_size, remove_columns=[column])


def load_blocks(script: ScriptArguments, args: TrainingArguments, train_text: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Datasets of blocks to train and to evaluate on; the latter may be None."""
    how = {"column": script.text_column, "block_size": script.block_size, "documents": script.dataset_name is not None}
    eval_text = load_text(script, evaluation=True)
    with args.main_process_first(desc="packing the text"):
        train = pack(train_text, tokenizer, **how)
        held_out = None if eval_text is None else pack(eval_text, tokenizer, **how)

    if script.streaming:
        if script.eval_blocks and held_out is not None:
            held_out = held_out.take(script.eval_blocks)
        elif script.eval_blocks:
            held_out, train = train.take(script.eval_blocks), train.skip(script.eval_blocks)
        return train.shuffle(seed=args.seed, buffer_size=SHUFFLE_BUFFER), held_out

    if held_out is None and script.eval_share > 0:
        first = len(train) - math.ceil(script.eval_share * len(train))
        train, held_out = train.select(range(first)), train.select(range(first, len(train)))
    for name, blocks in (("train", train), ("evaluate", held_out)):
        if blocks is not None and len(blocks) == 0:
            raise ValueError(
                f"the text to {name} on fills no block of {script.block_size} tokens; use more text or a smaller "
                "--block_size"
            )
    if held_out is not None and script.eval_blocks:
        held_out = held_out.select(range(min(script.eval_blocks, len(held_out))))
    return train, held_out


def new_config(script: ScriptArguments) -> Any:
    """The configuration of a model from scratch."""
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


def build_model(script: ScriptArguments, tokenizer: Any) -> Any:
    """The model to train: loaded or new, with adapters where LoRA is asked for."""
    if script.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype=script.dtype)
    else:
        config = new_config(script)
        config.vocab_size = len(tokenizer)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        model = AutoModelForCausalLM.from_config(config, dtype=script.dtype)

    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and script.block_size > longest:
        raise ValueError(
            f"block_size must be <= {longest}, the positions of the model, got {script.block_size}; use "
            f"--block_size {longest}, or --config_overrides for a new model with more positions"
        )
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"the model embeds {rows} tokens, the tokenizer has {len(tokenizer)}; use the model's own")
    if script.lora_r > 0:
        from peft import LoraConfig, get_peft_model

        targets: Any = script.lora_target_modules
        if targets == ["all-linear"]:
            targets = "all-linear"
        lora = LoraConfig(r=script.lora_r, lora_alpha=script.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return model


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, evaluates, saves, writes the model card; returns the metrics of both."""
    script, args = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.WARNING)
    set_seed(args.seed)

    checkpoint = args.resume_from_checkpoint
    if checkpoint is None and Path(args.output_dir).is_dir():
        checkpoint = last_complete_checkpoint(args.output_dir, model_only=args.save_only_model)
        if checkpoint is not None:
            logger.info("continuing from %s; use another --output_dir to start anew", checkpoint)

    text = load_text(script)
    tokenizer = load_tokenizer(script, args, text, resuming=checkpoint is not None)
    train, held_out = load_blocks(script, args, text, tokenizer)
    model = build_model(script, tokenizer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    blocks = "streamed blocks" if script.streaming else f"{len(train)} blocks"
    logger.info("training %s parameters on %s of %d tokens", f"{trained:,}", blocks, script.block_size)

    trainer = ClmTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    results = {"train": trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics}
    trainer.save_model()
    if held_out is not None:
        results["eval"] = trainer.evaluate()
    trainer.save_state()
    for split, metrics in results.items():
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    return results["train"] | results.get("eval", {})


if __name__ == "__main__":
    main()
