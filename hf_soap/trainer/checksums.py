"""Checksums for the files of a checkpoint: neither torch.load nor safetensors detects a flipped bit in a tensor."""

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
"""Checksums of one rank's files. With a file per rank, no rank reads all of a sharded checkpoint."""

_OF_RANK = re.compile(r"^(?:__|rng_state_)(\d+)(?:_\d+\.distcp|\.pth)$")
_DECIDING = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".metadata", ".index.json")
"""Suffixes of the files that determine how a run continues. A README or config.json may be edited on purpose."""

_REPLACED = re.compile(
    r"(?:model|adapter_model|pytorch_model)(?:-\d+-of-\d+|_fsdp)?\.(?:safetensors|bin)(?:\.index\.json)?"
    r"|optimizer\.(?:pt|bin)|(?:scheduler|scaler)\.pt|rng_state(?:_\d+)?\.pth"
    r"|(?:optimizer|pytorch_model_fsdp)_\d+/(?:\.metadata|__\d+_\d+\.distcp)"
)
"""Files that the Trainer writes; a file with any other name may be the user's."""

_STATE = "trainer_state.json"
"""Written last, after the checksums."""

INCOMPLETE = "checkpoint-is-incomplete.txt"
"""Marks a checkpoint that the Trainer saves on SIGTERM until it is complete."""


def begin(folder: Path, *, rank: int, writers: range, common: bool) -> None:
    """Removes the old files from a folder that is about to be overwritten, so that old and new ones never mix.

    A save does not always overwrite all old files: ``save_only_model`` writes no optimizer, and each format uses its
    own names. Files that the Trainer does not write are not removed.

    Args:
        folder: The checkpoint, which need not exist.
        rank: This rank.
        writers: The ranks that write into this folder.
        common: Whether this rank writes the files that all ranks share.
    """
    for name in (
        NAME.format(rank),
        INCOMPLETE,
    ):  # left by an interrupted save; the missing trainer_state.json marks it too
        (folder / name).unlink(missing_ok=True)
    if common:
        (folder / _STATE).unlink(missing_ok=True)
        current = {NAME.format(writer) for writer in writers}
        for path in folder.glob(NAME.format("*")):
            if path.name not in current:  # left by a run on more ranks
                path.unlink()
    for path in _deciding(folder, rank=rank, writers=writers, common=common):
        if _REPLACED.fullmatch(path.relative_to(folder).as_posix()):
            path.unlink()


def write(folder: Path, *, rank: int, writers: range, common: bool) -> None:
    """Records size and CRC-32 of the files of this rank that determine how a run continues.

    Args:
        folder: The checkpoint.
        rank: This rank.
        writers: The ranks that write into this folder.
        common: See :func:`begin`.
    """
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _crc(path)]
        for path in _deciding(folder, rank=rank, writers=writers, common=common)
    }
    noted = {"ranks": [writers.start, writers.stop], "files": files}
    (folder / NAME.format(rank)).write_text(json.dumps(noted, indent=1))


def read(folder: Path) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Reads the recorded checksums of a checkpoint.

    Args:
        folder: The checkpoint.

    Returns:
        Size in bytes and CRC-32 of each file by its name, and the names of the files of checksums that are missing.

    Raises:
        ValueError: If a file of checksums is unreadable.
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
        share: Index of this rank's part of the files, and the number of parts.

    Returns:
        A description of the first problem, or None.
    """
    for name, (size, crc) in sorted(noted.items())[share[0] :: share[1]]:
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or _crc(path) != crc:
                return f"{name} is damaged or changed (its size or checksum differs from {NAME.format('*')})"
        except OSError as error:
            return f"{name} is unreadable ({error})"
    return None


def writers(args: TrainingArguments) -> range:
    """Returns the ranks that write into the same folder: all, or those of this node with ``save_on_each_node``."""
    if not args.save_on_each_node:
        return range(args.world_size)
    first = args.process_index - args.local_process_index
    return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)))


def _deciding(folder: Path, *, rank: int, writers: range, common: bool) -> Iterator[Path]:
    """Yields this rank's files that determine how a run continues. Files of former ranks count as common ones."""
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
