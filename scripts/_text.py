"""Shared code of the scripts on language models: their arguments, tokenizers, and blocks of tokens."""

import importlib.util
import math
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

from _training import ModelArguments, option
from datasets import load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainingArguments

from hf_soap import SoapTrainer

END_OF_TEXT = "<|endoftext|>"
SHUFFLE_BUFFER = 1_000
TOKENIZER_ROWS = 1_000_000  # a stream may have no end


@dataclass
class TextArguments(ModelArguments):
    """Arguments for the model and the text; those for training are in TrainingArguments."""

    tokenizer_name: str | None = option(None, "Tokenizer, if it is not the model's own.")
    train_tokenizer_vocab: int | None = option(None, "Train a byte-level BPE of this size on the training text.")
    train_files: list[str] | None = option(
        None, "Text files or patterns to train on; stdlib:*.py and package:torch/*.py are files of this Python."
    )
    eval_files: list[str] | None = option(None, "Text files or glob patterns to evaluate on.")
    dataset_name: str | None = option(None, "A dataset for datasets.load_dataset, instead of files.")
    dataset_config: str | None = option(None, "Configuration of the dataset.")
    eval_split: str | None = option(None, "Split of the dataset to evaluate on.")
    text_column: str = option("text", "Column of the dataset with the text.")
    block_size: int = option(512, "Tokens of one sequence.")
    streaming: bool = option(False, "Read the text during training; needs --max_steps.")
    eval_share: float = option(
        0.05, "Share of the blocks to hold out, from the end, if no text for evaluation is given."
    )
    eval_blocks: int | None = option(
        None, "Evaluate on at most this many blocks; streaming holds out this many at the start."
    )

    def __post_init__(self) -> None:
        if (self.train_files is None) == (self.dataset_name is None):
            got = "neither" if self.train_files is None else "both"
            raise ValueError(
                f"wanted one source of text, got {got}; use --train_files 'folder/*.txt' or --dataset_name NAME"
            )
        super().__post_init__()
        if not (self.model_name_or_path or self.tokenizer_name or self.train_tokenizer_vocab or self.config_name):
            raise ValueError(
                "a model from scratch needs a tokenizer, got none; use --train_tokenizer_vocab 4096 to train one on "
                "the text, or --tokenizer_name FOLDER"
            )


class LanguageModelTrainer(SoapTrainer):
    """Reports perplexity with each evaluation."""

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss = output.metrics.get(f"{metric_key_prefix}_loss")
        if loss is not None:
            # exp overflows from 710 on; a diverged run should report infinity, not crash.
            output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(loss) if loss < 700 else math.inf
        return output


def expand(patterns: Iterable[str]) -> list[str]:
    """Returns the files that the patterns match, in sorted order."""
    files: list[str] = []
    for pattern in patterns:
        matches = sorted(glob(locate(pattern), recursive=True))
        if not matches:
            raise ValueError(f"no file matches {pattern!r}; name text files, or a pattern such as 'data/**/*.txt'")
        files += matches
    return files


def locate(pattern: str) -> str:
    """Replaces ``stdlib:`` and ``package:NAME`` in a pattern by folders of this Python.

    Recipes do not name folders of one machine, but the files of Python and its packages are the same on many.
    """
    place, _, below = pattern.partition(":")
    if place not in ("stdlib", "package"):
        return pattern
    if ".." in re.split(r"[/\\]", below):
        raise ValueError(f"got {pattern!r}, wanted files below the folder; remove the '..'")
    if place == "stdlib":
        return f"{sysconfig.get_path('stdlib')}/{below}"
    name, _, below = below.partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"got {pattern!r}, wanted an installed package after package:, as in package:torch/*.py")
    return f"{spec.submodule_search_locations[0]}/{below}"


def load_text(script: TextArguments, *, evaluation: bool = False) -> Any:
    """Returns the raw rows of text, or None if there is no text for evaluation."""
    if script.dataset_name:
        split = script.eval_split if evaluation else "train"
        if split is None:
            return None
        return load_dataset(script.dataset_name, script.dataset_config, split=split, streaming=script.streaming)
    patterns = script.eval_files if evaluation else script.train_files
    if not patterns:
        return None
    # Rows are lines with their line ends, so that packing restores the files exactly.
    return load_dataset(
        "text", data_files=expand(patterns), keep_linebreaks=True, split="train", streaming=script.streaming
    )


def train_tokenizer(texts: Iterator[str], *, vocab_size: int, folder: Path, named: dict[str, str]) -> None:
    """Trains a byte-level BPE and saves it in ``folder``.

    Args:
        texts: Texts to train on.
        vocab_size: Size of the vocabulary, including special tokens.
        folder: Folder to save to.
        named: Special tokens by name: the end of text, and others that the model needs.
    """
    bpe = ByteLevelBPETokenizer()
    special = list(dict.fromkeys(named.values()))
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=special, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **named).save_pretrained(folder)


def load_tokenizer(
    script: TextArguments, args: TrainingArguments, texts: Any, *, resuming: bool, **special: str
) -> Any:
    """Loads the given tokenizer, or has the first process train one on the text.

    Args:
        script: The script's arguments.
        args: The training arguments.
        texts: The rows to train a new tokenizer on.
        resuming: Whether to reuse a tokenizer in the output folder.
        special: Special tokens of a new tokenizer by name, in addition to the one that begins and ends a text.

    Returns:
        The tokenizer.
    """
    if script.train_tokenizer_vocab is None:
        return AutoTokenizer.from_pretrained(script.tokenizer_name or script.model_name_or_path or script.config_name)
    folder = Path(args.output_dir) / "tokenizer"
    with args.main_process_first(local=False, desc="training the tokenizer"):
        if args.process_index == 0 and not (resuming and folder.exists()):
            rows = (row[script.text_column] for row in islice(texts, TOKENIZER_ROWS))
            named = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} | special
            train_tokenizer(rows, vocab_size=script.train_tokenizer_vocab, folder=folder, named=named)
    return AutoTokenizer.from_pretrained(folder)


def pack(dataset: Any, tokenizer: Any, *, column: str, block_size: int, documents: bool) -> Any:
    """Concatenates the rows and cuts them into blocks of ``block_size`` tokens.

    Args:
        dataset: Rows of text, in memory or streamed.
        tokenizer: The tokenizer.
        column: The column with the text.
        block_size: Tokens of one block.
        documents: Whether each row is a separate text, which gets an end-of-text token; otherwise rows are lines.

    Returns:
        A dataset of ``input_ids`` of block_size ids each. Tokens that do not fill a block are dropped.
    """
    end = [tokenizer.eos_token_id] if documents and tokenizer.eos_token_id is not None else []

    def to_blocks(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        rows = tokenizer(batch[column], add_special_tokens=False)["input_ids"]
        ids = [token for row in rows for token in row + end]
        blocks = [ids[start : start + block_size] for start in range(0, len(ids) - block_size + 1, block_size)]
        return {"input_ids": blocks}

    # The last tokens of a batch may be dropped, so batches are large: many lines, or fewer but longer documents.
    batch_size = 1_000 if documents else 20_000
    rows = dataset.select_columns([column])
    return rows.map(to_blocks, batched=True, batch_size=batch_size, remove_columns=[column])


def load_blocks(script: TextArguments, args: TrainingArguments, train_text: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Returns datasets of blocks to train and to evaluate on; the latter may be None."""
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
                f"the text to {name} on does not fill a block of {script.block_size} tokens; use more text or "
                "a smaller --block_size"
            )
    if held_out is not None and script.eval_blocks:
        held_out = held_out.select(range(min(script.eval_blocks, len(held_out))))
    return train, held_out


def load_model(script: TextArguments, auto: Any, config: Any, tokenizer: Any) -> Any:
    """Returns the model to train, after checking that it fits the tokenizer and the blocks.

    Args:
        script: The script's arguments.
        auto: The class of transformers that loads or creates it.
        config: The config of a model from scratch; None loads a model.
        tokenizer: The tokenizer, which determines the vocabulary of a model from scratch.

    Returns:
        The model.

    Raises:
        ValueError: If it has too few positions or embeddings.
    """
    if config is None:
        model = auto.from_pretrained(script.model_name_or_path, dtype=script.dtype)
    else:
        config.vocab_size = len(tokenizer)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        model = auto.from_config(config, dtype=script.dtype)

    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and script.block_size > longest:
        raise ValueError(
            f"block_size must be <= {longest}, the positions of the model, got {script.block_size}; use "
            f"--block_size {longest}, or --config_overrides for a new model with more positions"
        )
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"the model embeds {rows} tokens, the tokenizer has {len(tokenizer)}; use the model's own")
    return model
