"""HTML that holds hostile text: everything is escaped, nothing is fetched, no script runs.

A page is one file: a style sheet and data URLs inside it, under a content security policy that forbids the rest.
"""

from __future__ import annotations

import base64
import html
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_HIDDEN = ("Cc", "Cs", "Co", "Cn", "Zl", "Zp")
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")


@dataclass(frozen=True)
class Html:
    """Markup that is safe as it is; plain strings are escaped wherever they meet it."""

    markup: str


Part = Html | str | int


def escape(text: str, limit: int = 4000) -> str:
    """Text for an element or a quoted attribute: markup escaped, control and direction marks shown as U+FFFD.

    Longer texts than `limit` are cut, so that one caption cannot fill a page.
    """
    cut = text if len(text) <= limit else text[:limit] + "…"
    shown = "".join(
        " " if c in "\t\n\r" else "\ufffd" if unicodedata.category(c) in _HIDDEN or c in _DIRECTIONS else c for c in cut
    )
    return html.escape(shown, quote=True)


def join(parts: Iterable[Part]) -> Html:
    """Parts one after the other."""
    return Html("".join(part.markup if isinstance(part, Html) else escape(str(part)) for part in parts))


def tag(name: str, *inside: Part, **attributes: str | int | None) -> Html:
    """An element. Attributes named `class_` lose their underscore; None leaves one out.

    Raises:
        ValueError: an attribute that could run or fetch something, such as an `href` that is no anchor.
    """
    written = []
    for key, value in attributes.items():
        word = key.rstrip("_").replace("_", "-")
        if value is None:
            continue
        text = str(value)
        is_local = word == "src" and text.startswith("data:image/") or word == "href" and text.startswith("#")
        if word.startswith("on") or word == "style" or word in ("src", "href") and not is_local:
            raise ValueError(f"attribute {word} is not allowed")
        limit = len(text) if word == "src" else 4000
        written.append(f' {word}="{escape(text, limit)}"')
    opening = f"<{name}{''.join(written)}>"
    return Html(opening) if name in ("img", "input", "br", "meta") else Html(f"{opening}{join(inside).markup}</{name}>")


def image(jpeg: bytes, alt: str) -> Html:
    """A small JPEG as a data URL."""
    data = base64.b64encode(jpeg).decode("ascii")
    return tag("img", src=f"data:image/jpeg;base64,{data}", alt=alt, loading="lazy")


def table(header: Iterable[str], rows: Iterable[Iterable[Part]], numbers: Iterable[int] = ()) -> Html:
    """A table in a box that scrolls by itself; the columns in `numbers` stand to the right."""
    right = set(numbers)
    head = join(tag("th", text, scope="col", class_="n" if k in right else None) for k, text in enumerate(header))
    body = join(
        tag("tr", join(tag("td", cell, class_="n" if k in right else None) for k, cell in enumerate(row)))
        for row in rows
    )
    return tag("div", tag("table", tag("thead", tag("tr", head)), tag("tbody", body)), class_="scroll")


def page(title: str, *body: Part) -> str:
    """A whole document."""
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{escape(title, 200)}</title><style>{_style()}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{join(body).markup}</body></html>\n'


@cache
def _style() -> str:
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
