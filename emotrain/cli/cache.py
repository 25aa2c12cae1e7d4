"""`emotrain cache`: how much of the disk the encoded pictures and captions take, and how to free it."""

from __future__ import annotations

from typing import Annotated

import typer

from emotrain.cli import output
from emotrain.cli.options import Json
from emotrain.errors import ResourceError

app = typer.Typer(help="Show and clear the cache")


@app.command()
def info(as_json: Json = False) -> None:
    """Show where the cache is and how large.

    It holds pictures and captions as the model's encoders give them, keyed by content. EMOTRAIN_CACHE
    names another folder for it.

    Examples:
        emotrain cache info
        EMOTRAIN_CACHE=/big/disk emotrain cache info --json
    """
    from emotrain.dataset.cachedir import default_cache_dir, measure

    folder = default_cache_dir()
    usage = measure(folder)
    size = sum(item.size for item in usage)
    if as_json:
        kinds = {item.kind: {"entries": item.entries, "bytes": item.size} for item in usage}
        output.json_object({"path": str(folder), "bytes": size, "kinds": kinds})
        return
    output.table([("path", str(folder)), ("size", _in_words(size))])
    output.table(
        [(item.kind, item.entries, _in_words(item.size)) for item in usage],
        header=("kind", "entries", "size"),
    )


@app.command()
def clear(
    unused_days: Annotated[
        float | None,
        typer.Option("--unused-days", min=0, help="Only entries that no run has used for so many days"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove the cache's entries.

    The next run encodes its pictures and captions again; nothing else is lost. Only the cache's own files are removed.

    Examples:
        emotrain cache clear
        emotrain cache clear --unused-days 30
    """
    from emotrain.dataset.cachedir import clear as clear_entries
    from emotrain.dataset.cachedir import default_cache_dir

    folder = default_cache_dir()
    try:
        count, size = clear_entries(folder, unused_days=unused_days)
    except OSError as error:
        message = f"cache {folder} cannot be cleared: {error.strerror}"
        raise ResourceError(message, "see who owns its files") from error
    if as_json:
        output.json_object({"path": str(folder), "entries": count, "bytes": size})
    else:
        output.result(f"{count} entries removed, {_in_words(size)}")


def _in_words(size: int) -> str:
    for unit, limit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= limit:
            return f"{size / limit:.1f} {unit}"
    return f"{size} bytes"
