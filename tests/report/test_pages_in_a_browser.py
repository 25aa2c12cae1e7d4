"""The pages in a real browser, where one is installed: widths, colours, the slider."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from run_folders import draw, make_run

from emotrain.dataset.lint_types import Finding, PictureRow, Report
from emotrain.report.lint_page import lint_page
from emotrain.runs import report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

# Every visible text against what is behind it: WCAG 2.2, 1.4.3: contrast ratio from relative luminances.
LEAST_CONTRAST = """
(() => {
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = parts(c).map(v => linear(v / 255));
                       return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
                        if (parts(c).length < 4 || parts(c)[3] > 0) return c; } return "rgb(255, 255, 255)"; };
  let least = 21;
  for (const e of document.querySelectorAll("main *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), color = e instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(color), light(behind(e))].sort((x, y) => y - x);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
})()
"""
SHOWN = """[...document.querySelectorAll(".strip figure")].filter(e => e.getClientRects().length)
           .map(e => e.querySelector("figcaption").textContent)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    one, two = make_run(folder, "x" * 60), make_run(folder, "two", base_loss=0.9)
    finding = Finding("blurred", "warning", "y" * 90, "is blurred", "take a sharper one")
    texts = {
        "run": report.page_of(one),
        "compare": report.page_of_several([one, two], folder),
        "lint": lint_page(Report((finding,), (PictureRow("y" * 90, 64, 64, ("z" * 200,)),), trigger="w" * 60)),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("name", ["run", "compare", "lint"])
def test_a_page_fits_its_screen_and_can_be_read(
    browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    browser.open(pages[name], width, scheme)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(LEAST_CONTRAST) >= 4.5
    dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")
    drawn = browser.run("[...document.querySelectorAll('.chart')].filter(e => e.getClientRects().length).length")
    assert drawn == {"run": 1, "compare": 2, "lint": 0}[name]
    assert browser.run("[...document.images].every(e => !e.complete || e.naturalWidth > 0)")
    assert browser.complaints == []


def test_the_slider_shows_one_step_beside_the_loras_own(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"], 1280, "light")
    assert browser.run(SHOWN) == ["step 20 (best)", "lora.safetensors"]
    browser.run("document.querySelector('.slider input').value = 0")
    browser.run("document.querySelector('.slider input').dispatchEvent(new Event('input'))")
    assert browser.run(SHOWN) == ["step 0", "lora.safetensors"]
    assert browser.run("document.querySelector('.slider output').textContent") == "step 0"
    browser.run("document.querySelector('.slider button').click()")
    assert browser.run(SHOWN) == ["step 0", "step 20 (best)", "lora.safetensors"]
    browser.run("document.querySelector('.slider button').click()")
    assert browser.run(SHOWN) == ["step 0", "lora.safetensors"]
    assert browser.complaints == []


def test_the_page_of_a_running_run_loads_itself_again_and_keeps_what_was_chosen(
    browser: Browser, tmp_path: Path
) -> None:
    folder = make_run(tmp_path, best_step=20)
    path = tmp_path / "page.html"
    path.write_text(report.page_of(folder, refresh_s=1), encoding="utf-8")
    browser.open(path, 1280, "light")
    browser.run("document.querySelector('.slider input').value = 0")
    browser.run("document.querySelector('.slider input').dispatchEvent(new Event('input'))")
    draw(folder.samples_dir / "step-00000010-1.png", 10)
    path.write_text(report.page_of(folder), encoding="utf-8")
    browser.wait("Page.loadEventFired")
    assert browser.run("document.querySelector('.slider input').max") == "2"  # the new step is there
    assert browser.run(SHOWN) == ["step 0", "lora.safetensors"]
    assert browser.run("document.body.dataset.refresh === undefined")  # it has ended
    assert browser.complaints == []


def test_a_script_in_a_caption_does_not_run(browser: Browser, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    code = "document.title='run'"
    draw(folder.samples_dir / "lora-1.png", 20, f'<img src=x onerror="{code}"><script>{code}</script>')
    path = tmp_path / "page.html"
    path.write_text(report.page_of(folder), encoding="utf-8")
    browser.open(path, 1280, "light")
    assert browser.run("document.title") == "mika: run report"
    assert browser.complaints == []
