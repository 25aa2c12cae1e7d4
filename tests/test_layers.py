"""The house: imports point down, torch stays out of the front rooms, files and functions stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

import emotrain
from emotrain.config.values import FamilyName
from emotrain.families.registry import FAMILIES

PACKAGE = Path(emotrain.__file__).parent
LEVELS = [
    {"errors", "files"},
    {"config", "pulse", "facts", "ranks"},
    {"diffusion", "batch"},
    {"families", "lora", "dataset", "optim"},
    {"train"},
    {"observers", "report"},
    {"runs"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FREE = {"assets"}  # data, and the script that made it
TORCH = {"torch", "diffusers", "transformers", "peft", "accelerate"}
# What is known of each model family without a file stands below the rooms that use it: `lora` may read it too.
FACTS = re.compile(r"emotrain\.families\.(?:registry|spec|unet|\w+\.spec)(?:\..*)?")
TORCH_FREE = {"errors", "files", "config", "pulse", "facts"}
TORCH_FREE_FILES = {
    *(f"dataset/{name}.py" for name in ("scan", "captions", "buckets", "lint", "images")),
    "families/table.py",
    "runs/preflight.py",
}
# decoders and loaders raise anything, and the page at a run's end must not cost the run
MAY_CATCH_ALL = {"cli/app.py", "dataset/images.py", "families/component.py", "runs/report.py"}
MAX_MODULE = 500
MAX_FUNCTION = 60


@cache
def sources() -> dict[Path, tuple[str, ast.Module]]:
    """Text and syntax tree of every module."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] not in FREE:
            text = path.read_text(encoding="utf-8")
            found[path] = (text, ast.parse(text))
    return found


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str | None:
    """`dataset`, `errors`; None for the package's own __init__ and __main__."""
    if FACTS.fullmatch("emotrain." + name_of(path).removesuffix(".py").replace("/", ".")):
        return "facts"
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if first.startswith("__") else first


def imports(tree: ast.AST, *, top_only: bool = False) -> Iterator[str]:
    """Full names of all imported modules; `top_only`: of those that importing the module itself imports."""
    for node in ast.iter_child_nodes(tree):
        if top_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for inner in node.orelse:
                yield from imports(inner, top_only=top_only)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, top_only=top_only)


def breaches(room: str, tree: ast.AST) -> list[str]:
    """Rooms that a module of `room` imports and must not."""
    wrong = set()
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] != "emotrain" or len(parts) < 2:
            continue
        other = "facts" if FACTS.fullmatch(name) else parts[1]
        if other in LEVEL and other != room and LEVEL[other] >= LEVEL[room]:
            wrong.add(other)
    return sorted(wrong)


def test_imports_point_down_only() -> None:
    wrong = []
    for path, (_, tree) in sources().items():
        room = room_of(path)
        if room is not None:
            assert room in LEVEL, f"{room} has no place in the order of the rooms"
            wrong += [f"{name_of(path)} imports {other}" for other in breaches(room, tree)]
    assert wrong == []


def test_an_upward_or_sideways_import_would_be_found() -> None:
    up = ast.parse("def f():\n    from emotrain.train.loop import fit\n")
    sideways = ast.parse("import emotrain.lora.file")
    typing_only = ast.parse("if TYPE_CHECKING:\n    from emotrain.train import loop")
    assert breaches("dataset", up) == ["train"]
    assert breaches("dataset", sideways) == ["lora"]
    assert breaches("dataset", typing_only) == ["train"]
    assert breaches("facts", ast.parse("import emotrain.families.sniff")) == ["families"]
    assert breaches("lora", ast.parse("import emotrain.families.registry")) == []
    assert breaches("train", sideways) == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""

    def reach(start: str) -> set[str]:
        seen, open_ = set(), list(graph[start])
        while open_:
            if (name := open_.pop()) not in seen:
                seen.add(name)
                open_ += graph[name]
        return seen

    reached = {name: reach(name) for name in graph}
    found = {frozenset(m for m in reached[name] if name in reached[m]) for name in graph if name in reached[name]}
    return sorted(sorted(group) for group in found)


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    """Inside the rooms too, and for the type checker too."""
    trees = {
        "emotrain." + name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__"): tree
        for path, (_, tree) in sources().items()
    }
    graph = {name: {other for other in imports(tree) if other in trees} - {name} for name, tree in trees.items()}
    assert sum(map(len, graph.values())) > 500
    assert circles(graph) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set(), "c": {"a", "b"}}) == []


def test_front_rooms_do_not_import_torch() -> None:
    wrong = []
    for path, (_, tree) in sources().items():
        free = room_of(path) in TORCH_FREE or name_of(path) in TORCH_FREE_FILES
        if free or room_of(path) == "cli":
            names = {name.split(".")[0] for name in imports(tree, top_only=not free)}
            wrong += [f"{name_of(path)} imports {name}" for name in sorted(names & TORCH)]
    assert wrong == []


def modules_after(code: str) -> set[str]:
    """Top-level names in sys.modules after `code` ran in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import emotrain.cli.app",
        "from emotrain.cli.app import build_app; import typer; typer.main.get_command(build_app())",
        "import emotrain.runs.preflight, emotrain.dataset.lint",
        "import emotrain.config.load, emotrain.pulse.signal, emotrain.families.table",
    ],
    ids=["app", "all-commands", "preflight-and-lint", "config"],
)
def test_torch_stays_out_of_the_process(code: str) -> None:
    assert not modules_after(code) & {"torch", "diffusers", "transformers", "peft"}


def test_the_check_on_modules_can_fail() -> None:
    assert "json" in modules_after("import json")


def test_importing_the_package_prints_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import emotrain, emotrain.cli.app"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout + done.stderr == ""


def test_modules_and_functions_stay_small() -> None:
    large = []
    for path, (text, tree) in sources().items():
        if (lines := len(text.splitlines())) > MAX_MODULE:
            large.append(f"{name_of(path)} has {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION:
                    large.append(f"{name_of(path)}: {node.name} has {length} lines")
    assert large == []


def test_no_broad_catches_and_no_prints() -> None:
    wrong = []
    for path, (_, tree) in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                broad = caught in ("everything", "Exception", "BaseException")
                if broad and name_of(path) not in MAY_CATCH_ALL:
                    wrong.append(f"{name_of(path)}:{node.lineno} catches {caught}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                wrong.append(f"{name_of(path)}:{node.lineno} prints")
    assert wrong == []


# What still tells families apart by name outside their folders, with how often; it may only shrink.
STRAYS = {
    "runs/propose.py": 1,
    "families/sniff.py": 4,
    "families/sniff_file.py": 2,
    "lora/check.py": 1,
    "lora/metadata.py": 1,
    "lora/origin.py": 10,
}


def test_a_family_lives_in_its_folder() -> None:
    found = {}
    for path, (_, tree) in sources().items():
        name = name_of(path)
        if room_of(path) == "facts" or name == "config/values.py":
            continue
        own = {family for family, spec in FAMILIES.items() if name.startswith(f"families/{spec.folder}/")}
        strays = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in {*FAMILIES} - own
        ]
        if strays:
            found[name] = len(strays)
    assert found == STRAYS


def test_the_preset_knows_the_families_of_the_registry() -> None:
    assert get_args(FamilyName) == tuple(FAMILIES)
