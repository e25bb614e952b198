"""Checksums beside the files of a checkpoint: neither torch.load nor safetensors notice a flipped bit in a tensor."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

NAME = "checksums_{}.json"
"""One per rank, for the files that it wrote, so that no rank reads all of a sharded checkpoint."""

_OF_RANK = re.compile(r"^(?:__|rng_state_)(\d+)(?:_\d+\.distcp|\.pth)$")
_STATE = "trainer_state.json"
"""Written last, behind the checksums."""

INCOMPLETE = "checkpoint-is-incomplete.txt"
"""Lies in a checkpoint that the Trainer saves on SIGTERM until it is whole."""


def begin(folder: Path, *, rank: int, writers: range, common: bool) -> None:
    """Marks a folder that is written once more as incomplete, so that old and new files never pass for one checkpoint.

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


def write(folder: Path, *, rank: int, writers: range, common: bool) -> None:
    """Notes size and CRC-32 of what this rank wrote into a checkpoint, at some gigabytes per second.

    Args:
        folder: The checkpoint.
        rank: This rank.
        writers: The ranks that write into this folder.
        common: As for :func:`begin`.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        of_rank = _OF_RANK.match(path.name)
        mine = int(of_rank[1]) == rank if of_rank else common
        if mine and path.is_file() and path.name not in (_STATE, INCOMPLETE) and not path.match(NAME.format("*")):
            files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _crc(path)]
    noted = {"ranks": [writers.start, writers.stop], "files": files}
    (folder / NAME.format(rank)).write_text(json.dumps(noted, indent=1))


def find_problem(folder: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Compares files with their checksums.

    Args:
        folder: The checkpoint.
        share: Which part of the files to read, and of how many.

    Returns:
        What is wrong with which file, or None if nothing is, or there are no checksums.
    """
    noted: dict[str, tuple[int, int]] = {}
    writers = range(0)
    for path in sorted(folder.glob(NAME.format("*"))):
        try:
            content = json.loads(path.read_text())
            writers = range(*content["ranks"])
            noted |= {name: (int(size), int(crc)) for name, (size, crc) in content["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{path.name} is unreadable ({error})"
    if missing := [writer for writer in writers if not (folder / NAME.format(writer)).is_file()]:
        return f"{NAME.format(missing[0])} is missing"
    for name, (size, crc) in sorted(noted.items())[share[0] :: share[1]]:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _crc(path) != crc:
            return f"{name} is not what was written (its size or checksum differs from {NAME.format('*')})"
    return None


def exist(folder: Path) -> bool:
    """Whether there are checksums in a folder."""
    return any(folder.glob(NAME.format("*")))


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc
