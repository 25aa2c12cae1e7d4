"""`emotrain caption`: change the captions of a folder, as a diff first."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emotrain.cli import output
from emotrain.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from emotrain.dataset.edit_captions import Edits
    from emotrain.dataset.examples import Example
    from emotrain.dataset.journal import Change

TAGS = 40  # in the table


@dataclass(frozen=True)
class _Left:
    """A picture whose caption is not changed here, and why."""

    path: Path
    why: str


def caption(
    folder: Annotated[Path, typer.Argument(help="A folder of pictures with their captions")],
    replace: Annotated[
        list[str] | None, typer.Option("--replace", help="OLD=NEW: a text, wherever it stands; repeatable")
    ] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="Take a tag out; repeatable")] = None,
    add: Annotated[list[str] | None, typer.Option("--add", help="Add a tag where it is missing; repeatable")] = None,
    move: Annotated[
        list[str] | None, typer.Option("--move", help="TAG=PLACE: 1 is the first, -1 the last; repeatable")
    ] = None,
    trigger: Annotated[str | None, typer.Option("--trigger", help="Put a word in front of every caption")] = None,
    propose: Annotated[
        Path | None, typer.Option("--propose", help="A captioning model's folder, for pictures without a caption")
    ] = None,
    ask: Annotated[str | None, typer.Option("--ask", help="With --propose: what to ask the model")] = None,
    again: Annotated[bool, typer.Option("--again", help="With --propose: also for those that have one")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write what the diff shows")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take the last --write back")] = False,
) -> None:
    """Change the captions of a folder.

    Shows the changes as a diff; only `--write` writes them, with the originals in a journal that `--undo` reverses.
    Edits are made in the order of the options above. Encoding, line ends and spacing of a file stay. Without an edit
    the tags are counted.

    Examples:
      emotrain caption ./mika
      emotrain caption ./mika --replace "brown hair=auburn hair" --remove watermark
      emotrain caption ./mika --trigger mika_ch --write
      emotrain caption ./mika --propose ./models/blip --write
      emotrain caption ./mika --propose ./models/Qwen3-VL-4B-Instruct --ask "List what is in this picture as tags."
      emotrain caption ./mika --undo
    """
    from emotrain.dataset.edit_captions import Edits

    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder", "name the folder that holds the pictures")
    edits = Edits(
        replace=[_pair(one, "--replace", "OLD=NEW") for one in replace or ()],
        remove=_tags(remove, "--remove"), add=_tags(add, "--add"),
        move=[_place(one) for one in move or ()], trigger=trigger.strip() if trigger else None,
    )  # fmt: skip
    if undo:
        if edits or propose or write:
            raise ConfigError("--undo stands alone", "take back first, then change")
        _undo(folder)
        return
    if write and not edits and propose is None:
        raise ConfigError(
            "--write without a change", "name one: --add, --remove, --replace, --move, --trigger, --propose"
        )
    if ask is not None and (propose is None or not ask.strip()):
        raise ConfigError("--ask is for a model", "--propose FOLDER --ask 'What is in this picture?'")
    examples = _pictures(folder)
    if not edits and propose is None:
        _statistics(examples)
        return
    changes, left = _changes(examples, folder, edits, _proposals(examples, propose, again, ask or ""))
    _show(changes, left, folder)
    _finish(changes, folder, write)


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    old, is_there, new = text.partition("=")
    if not is_there or not old:
        raise ConfigError(f"{option} is `{text}`, which is not {form}")
    return old, new


def _place(text: str) -> tuple[str, int]:
    tag, is_there, place = text.rpartition("=")
    digits = place.strip().removeprefix("-")
    if not is_there or not tag.strip() or not digits.isdecimal() or len(digits) > 6 or int(digits) == 0:
        raise ConfigError(f"--move is `{text}`, which is not TAG=PLACE", "1 is the first place, -1 the last")
    return tag.strip(), int(place)


def _tags(words: Sequence[str] | None, option: str) -> list[str]:
    found = [word.strip() for word in words or ()]
    if not all(found):
        raise ConfigError(f"{option} is empty", "name a tag")
    return found


def _pictures(folder: Path) -> tuple[Example, ...]:
    from emotrain.dataset.scan import FolderSpec, require_pictures, scan

    with output.progress("looking at pictures") as tell:
        found = require_pictures(scan((FolderSpec(path=str(folder)),), progress=tell))
    for item in found.errors():
        output.warning(f"{item.path} {item.reason}: left alone")
    return found.examples


def _statistics(examples: Sequence[Example]) -> None:
    from emotrain.dataset.lint_captions import tag_table

    with_caption = [example for example in examples if any(example.captions)]
    output.table(
        [(row.tag, row.count, f"{row.share:.0%}") for row in tag_table(examples, TAGS)], ("tag", "captions", "")
    )
    output.note(f"{len(with_caption)} of {len(examples)} pictures have a caption")


def _proposals(examples: Sequence[Example], model: Path | None, again: bool, ask: str) -> dict[Path, str]:
    """Picture -> what a captioning model says."""
    if model is None:
        return {}
    wanted = [one for one in examples if again or not any(one.captions)]
    if not wanted:
        output.note("all pictures have a caption: nothing to propose (`--again` proposes for all)")
        return {}
    from emotrain.dataset.images import open_picture
    from emotrain.runs.captioner import load_captioner

    describe = load_captioner(model, ask.strip())
    found = {}
    with output.progress("describing pictures") as tell:
        for index, example in enumerate(wanted):
            found[example.path] = describe(open_picture(example.path))
            if tell is not None:
                tell(index + 1, len(wanted))
    return found


def _changes(
    examples: Sequence[Example], root: Path, edits: Edits, proposals: dict[Path, str]
) -> tuple[list[Change], list[_Left]]:
    """What would be written, and the captions that are not changed here."""
    from emotrain.dataset.edit_captions import edit_bytes, edit_text
    from emotrain.dataset.journal import Change, why_not
    from emotrain.dataset.textfile import MAX_CAPTION_BYTES, read_bytes

    changes, left = [], []
    for example in examples:
        proposed = proposals.get(example.path)
        path = example.caption_path or example.path.with_suffix(".txt")
        if example.caption_source == "metadata" or path.suffix.lower() == ".json":
            left.append(_Left(example.path, "has its caption in a data file, which is not changed here"))
            continue
        before = None if example.caption_path is None else read_bytes(path, limit=MAX_CAPTION_BYTES)
        if proposed:
            after = edit_text(proposed, edits).encode("utf-8") + b"\n"
        elif before is None:
            continue  # `--propose` makes captions, edits change them
        else:
            after = edit_bytes(before, edits, path)
        if after == before:
            continue
        if len(after) > MAX_CAPTION_BYTES:
            left.append(_Left(path, f"would be longer than {MAX_CAPTION_BYTES:,} bytes"))
        elif (why := why_not(path, root)) is not None:
            left.append(_Left(path, why))
        else:
            changes.append(Change(path, before, after))
    return changes, left


def _show(changes: Sequence[Change], left: Sequence[_Left], root: Path) -> None:
    """The changed lines of each file."""
    from difflib import unified_diff

    from emotrain.dataset.edit_captions import text_of
    from emotrain.dataset.textfile import printable

    for change in changes:
        output.result(printable(change.path.relative_to(root)))
        before = [] if change.before is None else text_of(change.before).splitlines()
        for line in list(unified_diff(before, text_of(change.after).splitlines(), n=0, lineterm=""))[2:]:
            if line[0] in "-+":
                output.result(f"  {line[0]} {line[1:]}")
    for item in left:
        output.warning(f"{item.path} {item.why}")


def _finish(changes: Sequence[Change], folder: Path, write: bool) -> None:
    from emotrain.dataset import journal

    captions = f"{len(changes)} caption{'s' * (len(changes) != 1)}"
    if not changes:
        output.note("nothing to change")
    elif not write:
        output.note(f"{captions} would change; nothing is written without --write")
    else:
        journal.write(changes, folder)
        output.note(f"{captions} changed; `emotrain caption {shlex.quote(str(folder))} --undo` takes it back")


def _undo(folder: Path) -> None:
    from emotrain.dataset.journal import undo
    from emotrain.errors import CheckpointError

    done = undo(folder)
    output.note(f"{done.num_restored} captions are as they were")
    for path in done.left_alone:
        output.warning(f"{path} was changed since, and is left alone")
    if done.left_alone:
        raise CheckpointError(
            f"{len(done.left_alone)} captions were changed since and are not taken back",
            "their originals stay in the journal, .emotrain-captions in the folder",
        )
