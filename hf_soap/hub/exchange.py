"""Recipes in files and in repositories of the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from hf_soap.config.options import shown
from hf_soap.config.plain_yaml import MAX_BYTES
from hf_soap.hub.recipes import NAME, Recipe, embedded, read

CARD = "README.md"


def load(source: str) -> Recipe:
    """Reads a recipe.

    Args:
        source: A file, a folder with ``recipe.yaml`` or a model card, or a repository of the Hub, optionally with
            ``@`` and a revision.

    Returns:
        The recipe.

    Raises:
        ValueError: If there is no recipe, or it is refused.
    """
    return read(fetch(source), source=source)


def fetch(source: str) -> bytes:
    """Returns the YAML of a recipe unchanged; see :func:`load`."""
    path = Path(source)
    try:
        if path.is_dir():
            path = next((path / name for name in (NAME, CARD) if (path / name).is_file()), path / NAME)
        found = _read(source, path) if path.is_file() else None
        other = path.exists()
    except OSError as error:  # such as a name that is too long, or a file without read permission
        raise ValueError(f"got {shown(source)}, wanted a recipe that can be read: {error.strerror}") from error
    if found is not None:
        return _extract(source, path, found)
    if other or path.suffix in (".yaml", ".yml", ".md") or source.startswith((".", "/", "~")):
        raise ValueError(f"got {shown(source)}, wanted a recipe, found no file {path}; check the path")
    return _download(source)


def push(source: str, repo: str, *, private: bool | None = None, message: str | None = None) -> str:
    """Uploads a recipe as ``recipe.yaml`` and nothing else; creates the repository if there is none.

    Args:
        source: See :func:`load`.
        repo: ``user/name``.
        private: Whether a new repository is private; None uses the default of the account.
        message: Message of the commit.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: If the recipe is refused, or the Hub refuses it.
    """
    data = fetch(source)
    read(data, source=source)
    api = HfApi()
    with _failures(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_file(
            path_or_fileobj=data, path_in_repo=NAME, repo_id=repo, commit_message=message or f"Upload {NAME}"
        )
    return str(commit.commit_url)


def pull(source: str, folder: Path, *, overwrite: bool = False) -> Path:
    """Writes a recipe into a folder as ``recipe.yaml``.

    Args:
        source: See :func:`load`.
        folder: The folder, which is created if needed.
        overwrite: Whether to replace a different recipe.

    Returns:
        The file.

    Raises:
        ValueError: If the recipe is refused, or the folder has a different one.
    """
    data = fetch(source)
    read(data, source=source)
    path = folder / NAME
    if path.is_symlink():
        raise ValueError(f"got {path}, a link to {path.readlink()}, wanted a file or none; remove the link")
    if path.exists() and path.read_bytes() != data and not overwrite:
        raise ValueError(
            f"got {folder}, which has a different {NAME}, wanted one without; name another folder, or --overwrite"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _download(source: str) -> bytes:
    repo, _, revision = source.partition("@")
    for name in (NAME, CARD):
        with _failures(source):
            path = _download_file(source, repo, name, revision or None)
        if path is not None:
            return _extract(source, path, _read(source, path))
    where = (
        "in the cache (HF_HUB_OFFLINE is set, so that only the cache is read)" if constants.HF_HUB_OFFLINE else "there"
    )
    raise ValueError(f"got {shown(source)}, wanted a repository with {NAME} or a model card, found neither {where}")


def _download_file(source: str, repo: str, name: str, revision: str | None) -> Path | None:
    try:
        if not constants.HF_HUB_OFFLINE:
            # Checked first: otherwise the file would be on the disk before its size is known.
            _refuse_large(source, get_hf_file_metadata(hf_hub_url(repo, name, revision=revision)).size or 0)
        return Path(hf_hub_download(repo, name, revision=revision))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None


@contextmanager
def _failures(source: str) -> Iterator[None]:
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"got {shown(source)}, wanted a file, or a repository such as user/name: {error}") from error
    # The exception for a lost connection differs between versions of the client.
    except Exception as error:
        if type(error) is ValueError:
            raise
        raise ValueError(f"got {shown(source)}, wanted a repository that can be reached: {error}") from error


def _read(source: str, path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    _refuse_large(source, max(len(data), path.stat().st_size))
    return data


def _extract(source: str, path: Path, data: bytes) -> bytes:
    try:
        return embedded(data) if path.suffix == ".md" else data
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _refuse_large(source: str, size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(
            f"got {shown(source)} with {size} bytes, wanted at most {MAX_BYTES}; a recipe needs a few hundred"
        )
