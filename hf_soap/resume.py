"""Finding the last checkpoint folder that was written to its end."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path

logger = logging.getLogger(__name__)


def last_complete_checkpoint(folder: str | Path, *, model_only: bool = False) -> Path | None:
    """Finds the newest complete ``checkpoint-N`` folder, and warns about each newer one that it passes over.

    Args:
        folder: The Trainer's ``output_dir``.
        model_only: Whether checkpoints hold no optimizer (``save_only_model``).

    Returns:
        The folder, or None if there is no complete one.
    """
    numbered = [
        (int(match[1]), path) for path in Path(folder).glob("checkpoint-*") if (match := _NUMBER.search(path.name))
    ]
    for _, path in sorted(numbered, reverse=True):
        problem = find_problem(path, model_only=model_only)
        if problem is None:
            return path
        logger.warning("%s is incomplete and is passed over: %s", path, problem)
    return None


def find_problem(checkpoint: Path, *, model_only: bool = False) -> str | None:
    """Says what keeps a checkpoint folder from being resumed, or None if all of its files are whole.

    Files are checked for presence and for their ends, which a killed process leaves unwritten; contents are not read.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError) as error:
        return f"trainer_state.json: {error}"
    weights = [p for pattern in ("*.safetensors", "pytorch_model*.bin") for p in checkpoint.glob(pattern)]
    if not weights and not any(checkpoint.glob("*model*")):
        return "no model weights"
    for index in checkpoint.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except ValueError as error:
            return f"{index.name}: {error}"
        if missing := sorted(shards - {path.name for path in weights}):
            return f"{missing[0]} is missing"
    saved = [*weights]
    if not model_only:
        # A missing random state is the Trainer's to warn about, half of one stops it.
        saved += [checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth"), *checkpoint.glob("scaler.pt")]
        if not any(checkpoint.glob("optimizer_*")):
            saved += [checkpoint / "optimizer.pt"]
    return next((f"{path.name} is {problem}" for path in saved if (problem := _damage(path))), None)


_NUMBER = re.compile(r"^checkpoint-(\d+)$")


def _damage(path: Path) -> str | None:
    if not path.is_file():
        return "missing"
    if path.suffix != ".safetensors":
        return None if zipfile.is_zipfile(path) else "cut off"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return "cut off"
        try:
            header = json.loads(file.read(length))
        except ValueError:  # a file system that lost the content may leave zeros
            return "unreadable"
    end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    return None if size == 8 + length + end else "cut off"
