"""Presets that a stranger or a tired user may write: each is refused with the right code and words."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from emotrain.cli.app import main

MODEL = "model: builtin:tiny-sd\n"
GOOD = MODEL + "dataset: builtin:example\n"
Check = Callable[[str | bytes], tuple[int, str]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """Write `p.yaml` (the second line of GOOD is line 2), check it, return the code and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(content: str | bytes, *arguments: str) -> tuple[int, str]:
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        Path("p.yaml").write_bytes(data)
        before = sorted(os.listdir())
        code = main(["check", "p.yaml", *arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert sorted(os.listdir()) == before, "something was written"
        return code, captured.err + captured.out * (code == 0)

    return run


BAD = {
    "1 empty": ("", "p.yaml: an empty file is not a preset", "two keys are enough"),
    "2 comments only": ("# nothing\n\n", "an empty file is not a preset", ""),
    "3 list": ("- model\n- dataset\n", "p.yaml: a list is not a preset", "a preset has keys"),
    "4 scalar": ("quickstart\n", "p.yaml: a single value is not a preset", ""),
    "5 two documents": (GOOD + "---\n" + GOOD, "p.yaml:3: a second document", "remove the `---`"),
    "6 tab": (MODEL + "dataset:\n\ttrigger: x\n", "p.yaml:3:1: a tab is used", "spaces"),
    "7 bracket": (
        GOOD + "sample: {prompts: [a, b\nseed: 3\n",
        "p.yaml:4:",
        "is the bracket opened in line 3 closed?",
    ),
    "8 unknown key": (
        GOOD + "learning_rat: 1\n",
        "p.yaml:3: `learning_rat` is not a key of a preset (got `1`)",
        "did you mean `train.lr`?",
    ),
    "9 twice": (GOOD + "model: x\n", "p.yaml:3: `model` is set twice (first in line 1)", "keep one"),
    "11 word": (GOOD + 'train: {lr: "fast"}', "p.yaml:3: train.lr is `fast`, which is not a number", ""),
    "12 negative": (GOOD + "train: {lr: -1}", "train.lr is `-1`, but must be above 0", ""),
    "13 nan": (GOOD + "train: {lr: .nan}", "train.lr is `.nan`", ""),
    "13 infinite": (GOOD + "train: {lr: .inf}", "train.lr is `.inf`, which is not a finite number", ""),
    "14 zero": (GOOD + "network: {rank: 0}", "network.rank is `0`, but must be above 0", ""),
    "15 fraction": (GOOD + "network: {rank: 1.5}", "network.rank is `1.5`, which is not a whole number", ""),
    "16 huge rank": (
        GOOD + "network: {rank: 1000000000}",
        "p.yaml:3: network.rank is 1000000000, more than the 96 that the widest layer",
        "8 to 64 is usual",
    ),
    "17 alpha": (GOOD + "network: {alpha: 0}", "network.alpha is `0`, but must be above 0", ""),
    "18 yes": (GOOD + "train: {max_steps: yes}", "train.max_steps is `yes`, which is not a whole", ""),
    "18 true": (GOOD + "train: {max_steps: true}", "train.max_steps is `true`, which is not a whole", ""),
    "19 off the step": (
        GOOD + "resolution: 65\n",
        "p.yaml:3: dataset.resolution is 65, which is not a multiple of 8",
        "the nearest are 64 and 72",
    ),
    "20 huge resolution": (
        GOOD + "resolution: 100000\n",
        "dataset.resolution[0] is `100000`, but must be at most 8192",
        "",
    ),
    "21 wrong family": (
        "model: {base: builtin:tiny-sd, family: flux}\ndataset: builtin:example\n",
        "p.yaml:1: model.family is `flux`, but builtin:tiny-sd is sd15",
        "write `family: sd15`",
    ),
    "23 billion laughs": (
        GOOD + "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\n",
        "p.yaml:3: anchor `&a`: anchors and aliases are not read here",
        "extends",
    ),
    "24 recursive anchor": (GOOD + "a: &a [*a]\n", "p.yaml:3: anchor `&a`", ""),
    "25 deep": (GOOD + "a: " + "[" * 3000, "p.yaml:3: nested more than 32 levels deep", ""),
    "26 UTF-16": (GOOD.encode("utf-16"), "p.yaml is UTF-16, and presets are UTF-8", "save it as UTF-8"),
    "26 UTF-16 without mark": (GOOD.encode("utf-16-be"), "p.yaml is UTF-16", ""),
    "26 UTF-32": (GOOD.encode("utf-32"), "p.yaml is UTF-32", ""),
    "26 NUL": (GOOD.encode() + b"name: a\0b\n", "p.yaml:3: there is a NUL byte", ""),
    "26 latin-1": (GOOD.encode() + "name: Jürgen\n".encode("latin-1"), "p.yaml:3: byte 0xfc", ""),
    "27 up": (GOOD + "name: ../../etc/x\n", "p.yaml:3: name is `../../etc/x`, which is not a plain", ""),
    "27 absolute": (GOOD + "name: /etc/x\n", "name is `/etc/x`, which is not a plain name", ""),
    "27 drive": (GOOD + "name: 'C:\\x'\n", "name is `C:\\x`, which is not a plain name", ""),
    "27 device": (GOOD + "name: CON\n", "name is `CON`, which is a device's name on Windows", ""),
    "27 device with ending": (GOOD + "name: com1.yaml\n", "which is a device's name", ""),
    "29 100 MB": (GOOD.encode() + b"#" * 2_000_000, "p.yaml is 2.0 MB long", "the limit is 1 MB"),
    "control character": (GOOD + "name: 'a\tb'\n", "which holds a control character", ""),
    "too many values": (GOOD + "a: [" + "1, " * 11_000 + "1]\n", "more than 10000 values", ""),
    "long number": (GOOD + "train: {seed: " + "9" * 5000 + "}\n", "a number of 5000 digits", ""),
    "unknown builtin model": (
        "model: builtin:tiny-sdd\ndataset: builtin:example\n",
        "p.yaml:1: `builtin:tiny-sdd` is not a built-in model",
        "did you mean `builtin:tiny-sd`?",
    ),
    "unknown builtin data": (
        MODEL + "dataset: builtin:examples\n",
        "p.yaml:2: `builtin:examples` is not a built-in data set",
        "did you mean `builtin:example`?",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_preset_is_refused_with_exit_2_and_its_line(case: str, check: Check) -> None:
    content, message, hint = BAD[case]
    code, shown = check(content)
    assert code == 2
    assert message in shown
    assert hint in shown


def test_22_a_python_tag_runs_nothing(check: Check, tmp_path: Path) -> None:
    canary = tmp_path.parent / "canary"
    text = f'{GOOD}name: !!python/object/apply:os.system ["touch {canary}"]\n'
    code, shown = check(text)
    assert code == 2
    assert "p.yaml:3: tag `tag:yaml.org,2002:python/object/apply:os.system`" in shown
    assert not canary.exists()


def test_23_billion_laughs_cost_neither_time_nor_memory(check: Check) -> None:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for n in range(1, 40):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    code, shown = check(GOOD + "\n".join(lines))
    assert code == 2
    assert "more problems of this kind" in shown
    assert time.process_time() - start < 1.0
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 200_000 or sys.platform == "darwin"


def test_25_deep_nesting_is_refused_quickly(check: Check) -> None:
    start = time.process_time()
    code, _ = check("a: " + "[" * 300_000)
    assert code == 2
    assert time.process_time() - start < 1.0


def test_28_a_missing_data_set_is_exit_3(check: Check, tmp_path: Path) -> None:
    code, shown = check(MODEL + "dataset: ./nowhere\n")
    assert code == 3
    assert str(tmp_path / "nowhere") in shown
    assert "does not exist" in shown


def test_28_a_file_or_an_empty_folder_as_data_set_is_exit_3(check: Check, tmp_path: Path) -> None:
    code, shown = check(MODEL + "dataset: ./p.yaml\n")
    assert code == 3
    assert "is not a folder" in shown
    (tmp_path / "empty").mkdir()
    code, shown = check(MODEL + "dataset: ./empty\n")
    assert code == 3
    assert "no usable picture" in shown


def test_a_missing_model_is_exit_4(check: Check) -> None:
    code, shown = check("model: ./no.safetensors\ndataset: builtin:example\n")
    assert code == 4
    assert "no.safetensors" in shown


def test_all_of_a_preset_s_problems_come_in_one_report(check: Check) -> None:
    code, shown = check("model: ./no.safetensors\ndataset: ./nowhere\nstart_from: {stack: [x.safetensors]}\n")
    assert code == 4
    assert shown.count("error: ") == 3


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "forbidden"])
def test_30_what_is_not_a_readable_file_is_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.yaml"
    words = "does not exist"
    if kind == "folder":
        path.mkdir()
        words = "is a folder, not a preset"
    elif kind == "fifo":
        os.mkfifo(path)
        words = "is not a regular file"
    elif kind == "forbidden":
        path.write_text(GOOD)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
        words = "cannot be read: permission denied"
    assert main(["check", str(path)]) == 2
    assert words in capsys.readouterr().err


GOOD_PRESETS = {
    "two keys": GOOD,
    "byte order mark": "\ufeff" + GOOD,
    "10 exponent without a dot": GOOD + "train: {lr: 1e-4, optimizer: adamw}\n",
    "windows line ends": GOOD.replace("\n", "\r\n"),
    "no line end": GOOD.rstrip(),
    "aliases": GOOD + "network_dim: 8\nbatch_size: 2\ntrigger: x\n",
    "a word that YAML 1.1 takes for false": GOOD + "trigger: no\nname: on\n",
    "a time": GOOD + "trigger: 12:30:00\n",
    "quoted key": GOOD + '"network": {"rank": 4}\n',
    "document start": "---\n" + GOOD,
    "empty section": GOOD + "sample:\ntrain:\n",
}


@pytest.mark.parametrize("case", GOOD_PRESETS)
def test_a_good_preset_passes_with_exit_0(case: str, check: Check) -> None:
    code, shown = check(GOOD_PRESETS[case])
    assert code == 0, shown
    assert shown.rstrip().endswith("ok")
