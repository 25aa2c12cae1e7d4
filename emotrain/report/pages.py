"""Pages from templates: text from strangers is escaped, nothing is fetched, and no script runs but our own.

A page is one file: a style sheet, pictures as data URLs and at most one script inside it, under a content security
policy that forbids the rest.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from emotrain.files import clean

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
LONGEST = 4000  # characters of one text: no caption fills a page


def shown(value: object) -> object:
    """A text as a page shows it: cut at 4000 characters, control and direction marks as U+FFFD.

    Markup and everything that is no text are left alone.
    """
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return clean(value if len(value) <= LONGEST else value[:LONGEST] + "…")


def data_url(jpeg: bytes) -> Markup:
    """A JPEG as the `src` of an `img`."""
    return Markup("data:image/jpeg;base64,") + base64.b64encode(jpeg).decode("ascii")


@cache
def environment() -> Environment:
    """The templates; every text that they print is made showable, then escaped."""
    found = Environment(
        loader=PackageLoader("emotrain.report"),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["data_url"] = data_url
    return found


def render(template: str, *, script: str | None = None, refresh: int = 0, **values: Any) -> str:
    """A whole document.

    Args:
        template: its name.
        script: name of the one script that may run in it; the policy names its hash.
        refresh: seconds after which the open page loads itself again; 0: never.
        values: what the template shows.
    """
    policy, code = POLICY, None
    if script is not None:
        code = Markup(environment().get_template(script).render())
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode("ascii")
        policy = f"{POLICY}; script-src 'sha256-{digest}'"
    return environment().get_template(template).render(policy=policy, script=code, refresh=refresh, **values)
