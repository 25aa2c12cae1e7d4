"""What README, guides and concepts show works: commands run (but for those that train), YAML blocks are presets."""

from __future__ import annotations

import re
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import typer

from emotrain.cli.app import main
from emotrain.config.load import load

pytestmark = pytest.mark.usefixtures("counted_once")

ROOT = Path(__file__).parents[2]
STANDS_FOR = {
    "FOLDER": "./mika",
    "RUN": "mika",
    "FILE": "mika-a.safetensors",
    "FAMILY": "sdxl",
    "MODEL": "",
    "PRESET": "mika.yaml",
    "CONFIG": "config.toml",
}
TRAINS = {"run", "resume", "verify-resume"}  # whole runs: other tests have them
NEEDS_A_RUN = {"images", "report", "runs", "lora", "replay"}


PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
    *(ROOT / "docs" / "concepts").glob("*.md"),
]


def commands() -> list[str]:
    """The command lines of the pages, placeholders filled in."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for line in re.findall(r"^ *(emotrain .*)$", text, re.MULTILINE) + re.findall(r"`(emotrain [^`]+)`", text):
            words = [STANDS_FOR.get(word.strip("[]"), word) for word in shlex.split(line, comments=True)]
            spoken = words[1:] in ([words[1]], ["lora", "convert"]) and words[1] != "doctor"  # names in a sentence
            if not spoken:
                found.append(shlex.join([word for word in words[1:] if word]))
    return sorted(set(found))


def blocks() -> list[str]:
    """The YAML blocks of the pages."""
    return [
        textwrap.dedent(block)
        for page in PAGES
        for block in re.findall(r"^ *```yaml\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    ]


@pytest.mark.parametrize("block", blocks())
def test_every_yaml_block_is_a_preset_or_a_part_of_one(block: str, tmp_path: Path) -> None:
    whole = block if "extends:" in block else f"extends: quickstart\n{block}"
    (tmp_path / "shown.yaml").write_text(whole, encoding="utf-8")
    assert not load(tmp_path / "shown.yaml").notes  # what the pages teach is no foreign word


@pytest.mark.parametrize("line", commands())
def test_every_command_that_is_shown_has_options_that_exist(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typer.core.TyperCommand, "invoke", lambda self, context: None)
    assert main(shlex.split(line)) == 0


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages speak of, small: pictures, a model, a preset, another trainer's config, a run's LoRA."""
    folder, assets = tmp_path_factory.mktemp("docs"), ROOT / "emotrain" / "assets"
    (folder / "mika").mkdir()
    for picture in sorted((assets / "example").glob("*.png"))[:4]:
        for path in (picture, picture.with_suffix(".txt")):
            shutil.copy(path, folder / "mika")
    (folder / "models").mkdir()
    for name in ("my-checkpoint.safetensors", "x.safetensors"):
        shutil.copytree(assets / "tiny-sd", folder / "models" / name)
    foreign = ROOT / "tests" / "cli" / "foreign"
    for config in foreign.glob("kohya*"):
        shutil.copy(config, folder)  # the files that name each other
    (folder / "kohya_sdxl.toml").rename(folder / "config.toml")
    shutil.copy(foreign / "ai_toolkit.yaml", folder / "my_job.yaml")
    preset = (
        "extends: quickstart\nname: mika\ndataset: ./mika\ntrigger: mika_ch\nnetwork: {targets: [mid_block.*to_q]}\n"
    )
    for name in ("mika.yaml", "my.yaml"):
        (folder / name).write_text(preset, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after a run of `mika`, with copies under the other names of the pages."""
    folder = tmp_path_factory.mktemp("trained") / "docs"
    shutil.copytree(workshop, folder)
    words = [
        "train.max_steps=2",
        "sample.every=0",
        "sample.at_start=false",
        "validate.every=1",
        "log.tensorboard=false",
    ]
    runs = folder / "runs"
    assert main(["run", str(folder / "mika.yaml"), "--runs-dir", str(runs), *(f"--set={word}" for word in words)]) == 0
    for name in ("mika-r8", "mika-r16"):
        shutil.copytree(runs / "mika", runs / name)
    for name in ("mika-a", "mika-b"):
        shutil.copy(runs / "mika" / "lora.safetensors", folder / f"{name}.safetensors")
    return folder


def shown() -> list[Any]:
    """The commands that do not train; a plan of a public model counts a pass at its real size."""
    lines = [line for line in commands() if line.split()[0] not in TRAINS and "--propose" not in line]
    large = [line for line in lines if line.startswith("plan") and ".yaml" not in line]
    return [pytest.param(line, marks=pytest.mark.slow) if line in large else line for line in lines]


@pytest.mark.parametrize("line", shown())
def test_every_command_that_is_shown_runs(
    line: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_run = line.split()[0] in NEEDS_A_RUN or "--run" in line
    shutil.copytree(request.getfixturevalue("trained" if needs_run else "workshop"), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if line.startswith(("init", "import")):
        (tmp_path / "mika.yaml").unlink()  # what they write
    if "--undo" in line:
        assert main(["caption", "./mika", "--add", "soft light", "--write"]) == 0
    assert main(shlex.split(line)) == 0
