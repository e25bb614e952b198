"""Text for ``hf-soap compare``: it is read, tokenized and cut into equal blocks, and a fixed part is held out."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

HELD_OUT = 20
"""One piece of text in this many is held out for evaluation."""

BYTES = 256
"""The smallest vocabulary: every byte is a token."""

# Third-party code is not part of the interpreter; tests, tables and generated files say little about a language model.
_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Token blocks to train and to evaluate on.

    Attributes:
        train: Token ids, int64, (blocks, seq_len).
        held_out: Token ids of text that is not in ``train``, int64, (blocks, seq_len).
        tokenizer: Their tokenizer, which was given, or trained on the training text only.
        source: Where the text came from, in words.
        digest: SHA-256 of all blocks: equal digests mean equal data.
    """

    train: Tensor
    held_out: Tensor
    tokenizer: PreTrainedTokenizerFast
    source: str
    digest: str


def build_corpus(
    data: Path | None,
    *,
    vocab_size: int,
    seq_len: int,
    max_held_out: int,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Corpus:
    """Read text, train a byte-level BPE on it and cut it into blocks; the same text gives the same blocks.

    Args:
        data: A text file, or a folder of them; None uses the sources of Python's standard library.
        vocab_size: Size of the vocabulary; 256 makes every byte a token.
        seq_len: Tokens per block.
        max_held_out: Evaluate on at most this many blocks, spread evenly over the text held out.
        tokenizer: A tokenizer to use instead of training one; ``vocab_size`` is then ignored.

    Returns:
        The corpus. One file in twenty is held out; with fewer files, the last twentieth of each.

    Raises:
        ValueError: If the vocabulary is smaller than 256, or the text is absent or too short for one block.
    """
    if vocab_size < BYTES:
        raise ValueError(f"vocab_size must be >= {BYTES}, got {vocab_size}; use {BYTES} for raw bytes")
    files = text_files(data)
    train_text, held_out_text = _split([text for text in map(_read, files) if text])
    tokenizer = tokenizer or _train_tokenizer(train_text, vocab_size)
    train = _blocks(tokenizer, train_text, seq_len)
    held_out = _blocks(tokenizer, held_out_text, seq_len)
    if not len(train) or not len(held_out):
        raise ValueError(
            f"{data} must hold more than {HELD_OUT} blocks of {seq_len} tokens, got {len(train)} to train on and "
            f"{len(held_out)} to evaluate on; use more text or a smaller seq_len"
        )
    spread = torch.linspace(0, len(held_out) - 1, min(max_held_out, len(held_out))).long()
    held_out = held_out[spread]
    digest = hashlib.sha256(train.numpy().tobytes() + held_out.numpy().tobytes()).hexdigest()
    name = "Python's standard library" if data is None else str(data)
    return Corpus(
        train=train,
        held_out=held_out,
        tokenizer=tokenizer,
        source=f"{name}: {len(files)} files, {train.numel():,} training tokens",
        digest=digest,
    )


def load_tokenizer(model: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model.

    Args:
        model: A folder, or a name on the Hub.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If there is none, or none of the fast kind.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"got the model {model!r}, wanted a folder or a name on the Hub: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{model} must have a fast tokenizer, got {type(tokenizer).__name__}; use another model")
    return tokenizer


def text_files(data: Path | None) -> list[Path]:
    """List the files that a corpus is read from.

    Args:
        data: A text file, a folder, which is searched to the bottom, or None for Python's standard library.

    Returns:
        The files in sorted order.

    Raises:
        ValueError: If ``data`` does not exist or holds no file.
    """
    if data is not None:
        files = sorted(path for path in data.rglob("*") if path.is_file()) if data.is_dir() else [data]
        if not files or not files[0].is_file():
            raise ValueError(f"data must be a text file or a folder of text files, got {data}; check the path")
        return files
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _NOT_PROSE & set(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # a folder of text may contain a picture


def _split(texts: list[str]) -> tuple[list[str], list[str]]:
    if len(texts) < HELD_OUT:
        texts = [piece for text in texts for piece in _cut(text)]
    train = [text for i, text in enumerate(texts, 1) if i % HELD_OUT]
    return train, texts[HELD_OUT - 1 :: HELD_OUT]


def _cut(text: str) -> list[str]:
    edges = [len(text) * i // HELD_OUT for i in range(HELD_OUT + 1)]
    return [text[start:end] for start, end in pairwise(edges)]


def _train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _blocks(tokenizer: PreTrainedTokenizerFast, texts: list[str], seq_len: int) -> Tensor:
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [token for encoding in encodings for token in encoding.ids]
    count = len(ids) // seq_len
    return torch.tensor(ids[: count * seq_len], dtype=torch.int64).view(count, seq_len)
