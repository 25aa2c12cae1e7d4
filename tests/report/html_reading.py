"""Pages read as a browser reads them, and texts that try to be more than text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><body onload=alert(1)>", "'; alert(1)//",
    "<!-- --><svg/onload=alert(1)>", "javascript:alert(1)", "\u202egnp.exe", "&lt;b&gt;", "]]>", "\x00\x1b", "\udcff",
    "<meta http-equiv=refresh content=0;url=//x>", "{{7*7}}", "{% raw %}", "\u2028", "<a href=//evil>", "x" * 100_000,
]  # fmt: skip
ALLOWED = set(
    re.findall(
        r"\w+",
        "html head meta title style body main header h1 h2 p div b nav a section details summary span ul li bdi figure "
        "img figcaption table thead tbody tr th td meter",
    )
)


class Elements(HTMLParser):
    """All elements with their attributes, and all text outside the style sheet."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._pieces: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in_style = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._in_style else data
        self._pieces += [] if self._in_style else data.split()

    @property
    def words(self) -> str:
        """The text with single spaces between its pieces."""
        return " ".join(self._pieces).replace(" :", ":")


def assert_harmless(elements: Elements, allowed: set[str]) -> None:
    """Known elements alone, nothing that runs or fetches, and no character that hides or turns text."""
    assert {name for name, _ in elements.found} <= allowed
    for name, attributes in elements.found:
        assert not any(key.startswith("on") or key in ("style", "srcset", "srcdoc") for key in attributes), name
        assert (attributes.get("src") or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert (attributes.get("href") or "#").startswith(("#", "./"))
    assert not set(elements.text) & set("\u202e\x00\x1b\udcff\u2028")


def read(text: str) -> Elements:
    elements = Elements()
    elements.feed(text)
    return elements
