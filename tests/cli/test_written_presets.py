"""The presets that are written for the user: editors find their schema, and it knows every key and value in them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from emotrain.cli.app import main
from emotrain.config.builtin import shipped_presets
from emotrain.config.reference import SCHEMA_FILE, SCHEMA_LINE, preset_schema

sys.path.insert(0, str(Path(__file__).parents[1] / "config"))

from schema_reading import problems

FOREIGN = Path(__file__).parent / "foreign"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))  # noqa: TID251  what any YAML reader sees


def broken(preset: Any) -> list[str]:
    """What an editor would underline; by jsonschema too, where it is installed."""
    schema = preset_schema()
    found = list(problems(preset, schema, schema))
    try:
        import jsonschema
    except ImportError:
        return found
    assert bool(found) != jsonschema.Draft202012Validator(schema).is_valid(preset)
    return found


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures_dir: Path) -> Path:
    shutil.copytree(pictures_dir, tmp_path / "mika")
    shutil.copytree(FOREIGN, tmp_path / "foreign")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["init", "mika", "builtin:tiny-sd", "-o", "new.yaml"],
        ["import", "foreign/ai_toolkit.yaml", "builtin:tiny-flux", "-o", "new.yaml"],
        ["import", "foreign/kohya_sdxl.toml", "builtin:tiny-sd", "-o", "new.yaml"],
        ["presets", "copy", "illustrious", "new.yaml"],
    ],
)
def test_editors_find_the_schema_beside_the_preset_and_it_holds(words: list[str], here: Path) -> None:
    assert main(words) == 0
    assert (here / "new.yaml").read_text("utf-8").startswith(SCHEMA_LINE)
    schema = json.loads((here / SCHEMA_LINE.rpartition("=")[2].strip()).read_text("utf-8"))
    assert schema == preset_schema()
    assert broken(read(here / "new.yaml")) == []


@pytest.mark.parametrize("name", shipped_presets())
def test_the_schema_knows_every_shipped_preset(name: str) -> None:
    assert broken(read(shipped_presets()[name])) == []


@pytest.mark.parametrize(
    ("preset", "where"),
    [
        ({"model": "x", "dataset": "y", "trian": {}}, ".trian is no key"),
        ({"model": "x", "dataset": {"folders": ["y"], "balance": "same"}}, ".dataset.balance"),
        ({"model": {"quantize": "int4"}, "dataset": "y"}, ".model.quantize is none of"),
        ({"model": "x", "dataset": "y", "train": {"micro_batch_size": "4"}}, ".train.micro_batch_size is not of type"),
    ],
)
def test_the_schema_says_what_is_wrong(preset: Any, where: str) -> None:
    assert any(where in one for one in broken(preset)), broken(preset)


def test_a_schema_of_ours_is_brought_up_to_date_and_a_foreign_one_stays(here: Path) -> None:
    old = json.dumps({"properties": {}, "title": "emotrain preset"}, indent=2)
    (here / SCHEMA_FILE).write_text(old)
    assert main(["presets", "copy", "sdxl", "a.yaml"]) == 0
    assert json.loads((here / SCHEMA_FILE).read_text("utf-8")) == preset_schema()
    (here / SCHEMA_FILE).write_text("{}")
    assert main(["presets", "copy", "sdxl", "b.yaml"]) == 0
    assert (here / SCHEMA_FILE).read_text() == "{}"
