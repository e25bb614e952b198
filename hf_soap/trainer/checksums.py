"""Checksums beside the files of a checkpoint: neither torch.load nor safetensors notice a flipped bit in a tensor."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments

NAME = "checksums_{}.json"
"""One per rank, for the files that it wrote, so that no rank reads all of a sharded checkpoint."""

_OF_RANK = re.compile(r"^(?:__|rng_state_)(\d+)(?:_\d+\.distcp|\.pth)$")
_DECIDING = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".metadata", ".index.json")
"""Ends of the names of what decides how a run goes on; who edits a README or config.json knows it."""

_REPLACED = re.compile(
    r"(?:model|adapter_model|pytorch_model)(?:-\d+-of-\d+|_fsdp)?\.(?:safetensors|bin)(?:\.index\.json)?"
    r"|optimizer\.(?:pt|bin)|(?:scheduler|scaler)\.pt|rng_state(?:_\d+)?\.pth"
    r"|(?:optimizer|pytorch_model_fsdp)_\d+/(?:\.metadata|__\d+_\d+\.distcp)"
)
"""What the Trainer writes, in its places: a file of any other name may be the user's own."""

_STATE = "trainer_state.json"
"""Written last, behind the checksums."""

INCOMPLETE = "checkpoint-is-incomplete.txt"
"""Lies in a checkpoint that the Trainer saves on SIGTERM until it is whole."""


def begin(folder: Path, *, rank: int, writers: range, common: bool) -> None:
    """Empties a folder that is written once more, so that old and new files never pass for one checkpoint.

    Not every save writes all that another left: ``save_only_model`` has no optimizer, and each format has names of its
    own. What the Trainer does not write stays.

    Args:
        folder: The checkpoint, which need not exist.
        rank: This rank.
        writers: The ranks that write into this folder.
        common: Whether this rank writes the files that are not of one rank alone.
    """
    for name in (NAME.format(rank), INCOMPLETE):  # of a save that ended too early; what is missing says so too
        (folder / name).unlink(missing_ok=True)
    if common:
        (folder / _STATE).unlink(missing_ok=True)
        kept = {NAME.format(writer) for writer in writers}
        for path in folder.glob(NAME.format("*")):
            if path.name not in kept:  # of a run on more ranks
                path.unlink()
    for path in _deciding(folder, rank=rank, writers=writers, common=common):
        if _REPLACED.fullmatch(path.relative_to(folder).as_posix()):
            path.unlink()


def write(folder: Path, *, rank: int, writers: range, common: bool) -> None:
    """Notes size and CRC-32 of what this rank wrote into a checkpoint and decides how a run goes on.

    Args:
        folder: The checkpoint.
        rank: This rank.
        writers: The ranks that write into this folder.
        common: As for :func:`begin`.
    """
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _crc(path)]
        for path in _deciding(folder, rank=rank, writers=writers, common=common)
    }
    noted = {"ranks": [writers.start, writers.stop], "files": files}
    (folder / NAME.format(rank)).write_text(json.dumps(noted, indent=1))


def read(folder: Path) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Reads what was noted of a checkpoint.

    Args:
        folder: The checkpoint.

    Returns:
        Size in bytes and CRC-32 of each file by its name, and the names of notes that other ranks wrote and that are
        missing.

    Raises:
        ValueError: If one of the notes is unreadable.
    """
    noted: dict[str, tuple[int, int]] = {}
    writers = range(0)
    for path in sorted(folder.glob(NAME.format("*"))):
        try:
            content = json.loads(path.read_text())
            writers = range(*content["ranks"])
            noted |= {name: (int(size), int(crc)) for name, (size, crc) in content["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} is unreadable ({error})") from error
    names = [NAME.format(writer) for writer in writers]
    return noted, [name for name in names if not (folder / name).is_file()]


def find_problem(folder: Path, noted: Mapping[str, tuple[int, int]], *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Compares files with their checksums.

    Args:
        folder: The checkpoint.
        noted: Size in bytes and CRC-32 of the files to compare, by name.
        share: Which part of the files to read, and of how many.

    Returns:
        What is wrong with which file, or None if nothing is.
    """
    for name, (size, crc) in sorted(noted.items())[share[0] :: share[1]]:
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or _crc(path) != crc:
                return f"{name} is not what was written (its size or checksum differs from {NAME.format('*')})"
        except OSError as error:
            return f"{name} is unreadable ({error})"
    return None


def writers(args: TrainingArguments) -> range:
    """Returns the ranks that write into the same folder as this one: all, or with ``save_on_each_node`` its node's."""
    if not args.save_on_each_node:
        return range(args.world_size)
    first = args.process_index - args.local_process_index
    return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)))


def _deciding(folder: Path, *, rank: int, writers: range, common: bool) -> Iterator[Path]:
    """The files of this rank that decide how a run goes on; who writes the common ones has those of ranks now gone."""
    for path in sorted(folder.rglob("*")):
        of_rank = _OF_RANK.match(path.name)
        mine = common if of_rank is None or int(of_rank[1]) not in writers else int(of_rank[1]) == rank
        if mine and path.name.endswith(_DECIDING) and path.name != "training_args.bin" and path.is_file():
            yield path


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while context := file.read(1 << 22):
            crc = zlib.crc32(context, crc)
    return crc
