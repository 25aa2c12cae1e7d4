"""Models on the hub: small JSON files, and what its errors mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emotrain.errors import ModelError
from emotrain.families.headers import INDEX, MODULAR_INDEX, index_entries, read_json


def fetch_json(repo: str, name: str, revision: str | None = None) -> dict[str, Any]:
    """A JSON file of a repository, from the local cache or the network.

    Raises:
        ModelError: not there, not allowed, or no network.
    """
    import huggingface_hub

    try:
        return read_json(Path(huggingface_hub.hf_hub_download(repo, name, revision=revision)))
    except (OSError, ValueError) as error:
        known = hub_error(repo, error)
        raise known or ModelError(f"`{repo}` on the hub cannot be read: {error}") from error


def fetch_index(repo: str, revision: str | None = None) -> dict[str, Any]:
    """The index of a repository, of a pipeline or of modular blocks; see `headers.read_index`.

    Raises:
        ModelError: as `fetch_json`.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return index_entries(fetch_json(repo, INDEX, revision))
    except ModelError as error:
        cause = error.__cause__
        if not isinstance(cause, EntryNotFoundError) or isinstance(cause, LocalEntryNotFoundError):
            raise
        return index_entries(fetch_json(repo, MODULAR_INDEX, revision))


def fetched_folder(repo: str, revision: str | None = None) -> Path | None:
    """Where the local cache has a repository's files, as far as they are there; None where it has nothing of it."""
    import huggingface_hub

    for name in (INDEX, MODULAR_INDEX):
        found = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def hub_error(where: str, error: BaseException) -> ModelError | None:
    """The ModelError that a hub error amounts to; None where `error` is about something else."""
    from huggingface_hub import errors

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for link in chain:
        if isinstance(link, errors.GatedRepoError):
            return ModelError(
                f"`{where}` is gated on the hub",
                "accept its licence on its page, then run `hf auth login`",
            )
        if isinstance(link, errors.RevisionNotFoundError):
            return ModelError(
                f"`{where}` has no such revision on the hub",
                "leave model.revision out, or use a branch, tag or commit that exists",
            )
        if isinstance(link, errors.EntryNotFoundError) and not isinstance(link, errors.LocalEntryNotFoundError):
            return ModelError(
                f"`{where}` on the hub is not a diffusers model: a file is missing there",
                "use a repository with model_index.json, or download its .safetensors file",
            )
        if isinstance(link, errors.RepositoryNotFoundError):
            return ModelError(
                f"`{where}` is not on the hub, or private",
                "check the spelling; for a private one run `hf auth login`",
            )
        if isinstance(link, errors.HFValidationError):
            return ModelError(
                f"`{where}` is neither a path that exists nor a hub id",
                "a hub id has the form `owner/name`",
            )
        if isinstance(link, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError):
            return ModelError(
                f"`{where}` is not in the local cache and the hub cannot be reached",
                "go online once, or give the path of a folder or file that you have",
            )
    return None


def fetch_folder(repo: str, patterns: list[str]) -> Path | None:
    """Files of a repository, from the local cache or the network; None where neither has them.

    Raises:
        ModelError: the repository refuses.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        known = hub_error(repo, error)
        if known is None or "cannot be reached" in known.message:
            return None
        raise known from error
