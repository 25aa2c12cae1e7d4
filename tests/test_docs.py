"""The documentation holds together: every page is reachable, every link leads somewhere, every command exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from emotrain.cli.app import COMMANDS
from emotrain.config.builtin import shipped_presets

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"emotrain ([a-z][a-z-]+)")


def links(page: Path) -> list[Path]:
    found = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    return [(page.parent / link).resolve() for link in found]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert [str(target) for target in links(page) if not target.exists()] == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    pending = [ROOT / "README.md"]
    while pending:
        page = pending.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in links(page):
            pending += sorted(target.glob("*.md")) if target.is_dir() else [target] if target.suffix == ".md" else []
    assert [page.name for page in PAGES if page not in seen] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_every_command_that_is_named_exists(page: Path) -> None:
    """In quoted code and code blocks; prose says `emotrain is` and the like."""
    text = page.read_text(encoding="utf-8")
    quoted = re.findall(r"`(emotrain [^`]+)`", text) + re.findall(r"^ *(emotrain .*)$", text, re.MULTILINE)
    used = {match[1] for words in quoted for match in COMMAND.finditer(words)}
    prose = {"is", "has", "was", "and", "reads", "writes"}
    assert sorted(used - {command.name for command in COMMANDS} - prose) == []


def test_the_guide_of_models_names_every_preset() -> None:
    guide = (ROOT / "docs" / "guides" / "models.md").read_text(encoding="utf-8")
    names = [name for name in shipped_presets() if not name.startswith("quickstart")]
    assert [name for name in names if f"`{name}`" not in guide] == []
