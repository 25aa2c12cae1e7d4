"""How commands are found, how they fail, what goes to which stream."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import emotrain
from emotrain.cli import app as app_module
from emotrain.cli import output
from emotrain.cli.app import COMMANDS, build_app, main
from emotrain.cli.helptext import help_text
from emotrain.errors import ConfigError, DivergedError, Problem

Captured = pytest.CaptureFixture[str]


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "emotrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def fail_with(monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    def run(words: list[str]) -> int:
        raise failure

    monkeypatch.setattr(app_module, "_run", run)


def test_version_goes_to_stdout(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"emotrain {emotrain.__version__}\n"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command_with_its_line(flag: str, capsys: Captured) -> None:
    assert main([flag]) == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert command.help.split(",")[0] in shown
    for panel in ("Train", "Prepare", "Inspect", "Files"):
        assert panel in shown


def test_help_lines_are_short_imperatives_without_full_stop() -> None:
    for command in COMMANDS:
        assert len(command.help) <= 60
        assert not command.help.endswith(".")
        assert command.help[0].isupper()


def test_every_command_has_help_of_its_own(capsys: Captured) -> None:
    for command in COMMANDS:
        assert main([command.name, "--help"]) == 0
        assert f"emotrain {command.name}" in capsys.readouterr().out


def test_without_arguments_the_help_is_shown_and_the_exit_code_is_2(capsys: Captured) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "Usage: emotrain" in captured.out + captured.err
    assert "error:" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["rnu"], "no such command `rnu`", "did you mean `run`?"),
        (["presets", "shw"], "no such command `shw`", "did you mean `show`?"),
        (["check", "--jsno", "x"], "no such option `--jsno`", "did you mean `--json`?"),
        (["check"], "missing argument `preset`", "see `emotrain check --help`"),
        (["check", "a", "b"], "got unexpected extra argument (b)", "see `emotrain check --help`"),
    ],
)
def test_usage_errors_are_exit_2_in_the_house_shape(
    arguments: list[str], message: str, hint: str, capsys: Captured
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n\nhint: {hint}\n"
    assert captured.out == ""


def test_several_problems_are_printed_one_after_another(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    problems = (Problem("a is wrong", "mend a"), Problem("b is wrong"))
    fail_with(monkeypatch, ConfigError("a is wrong", "mend a", problems=problems))
    assert main(["check", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: a is wrong\n\nhint: mend a\n\nerror: b is wrong\n"
    assert json.loads(captured.out) == {
        "schema_version": 1,
        "error": {
            "code": 2,
            "message": "a is wrong",
            "hint": "mend a",
            "more": [{"message": "b is wrong", "hint": None}],
        },
    }
    assert captured.out.count("\n") == 1


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (DivergedError("loss is not finite"), 7),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 6),
        (OSError(28, "No space left on device"), 6),
        (RuntimeError("CUDA out of memory"), 6),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 6),
        (SystemExit(3), 3),
        (typer.BadParameter("bad"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_failure_has_its_exit_code(
    failure: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    import emotrain.train.memory  # noqa: F401 - torch's errors come where torch is loaded

    fail_with(monkeypatch, failure)
    assert main(["check"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_our_own_bug_leaves_a_traceback_in_a_file_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    fail_with(monkeypatch, ValueError("surprise\nsecond line"))
    assert main(["check"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: emotrain failed unexpectedly: ValueError: surprise\n\nhint: ")
    (file,) = tmp_path.iterdir()
    assert str(file) in shown
    text = file.read_text(encoding="utf-8")
    assert f"emotrain {emotrain.__version__}" in text
    assert "Traceback" in text
    assert "second line" in text


def test_the_traceback_goes_into_the_run_folder_where_one_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    failure = RuntimeError("surprise")
    failure.run_dir = tmp_path  # type: ignore[attr-defined]
    fail_with(monkeypatch, failure)
    assert main(["run"]) == 1
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("traceback-")
    assert str(file) in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = start("presets", "schema")
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


def test_colour_is_for_terminals_alone_and_no_color_is_honoured(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm")
    output.error([Problem("x")])
    assert capsys.readouterr().err == "\x1b[31;1merror:\x1b[0m x\n"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            output.error([Problem("x")])
        assert capsys.readouterr().err == "error: x\n"


def test_control_characters_and_markup_are_shown_harmlessly(capsys: Captured) -> None:
    output.result("a\x1b[31mred\x07 \u202eevil [bold]x[/] [link=http://x]y\nz\x9b")
    shown = capsys.readouterr().out
    assert shown == "a\ufffd[31mred\ufffd \ufffdevil [bold]x[/] [link=http://x]y z\ufffd\n"
    output.error([Problem("bad \x1b]0;title\x07", "no \x1b[2J")])
    assert "\x1b" not in capsys.readouterr().err
    output.json_line({"a": "\x1b \u202e"})
    assert capsys.readouterr().out == '{"a": "\\u001b \\u202e"}\n'


def test_letters_of_all_scripts_and_emoji_stay(capsys: Captured) -> None:
    text = "über 日本語 👩‍🚀 café"
    output.result(text)
    assert capsys.readouterr().out == text + "\n"


def test_a_table_is_aligned_with_wide_letters(capsys: Captured) -> None:
    output.table([("a", 1, "x"), ("日本", 200, "y")], ("name", "n", "z"))
    assert capsys.readouterr().out == "name  n    z\na       1  x\n日本  200  y\n"
    output.table([])
    assert capsys.readouterr().out == ""


def test_a_console_without_the_letters_does_not_end_the_program() -> None:
    process = start("check", "日本語", PYTHONIOENCODING="cp1252")
    _, shown = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "`???` is not a shipped preset" in shown


def test_examples_keep_their_lines() -> None:
    text = help_text("Do it.\n\n    Words.\n\n    Examples:\n      a b\n      c d\n\n    After.\n    ")
    assert text == "Do it\n\nWords.\n\nExamples:\n\n    a b\n    c d\n\nAfter."


def test_bitsandbytes_does_not_write_a_line_for_every_product() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    assert logging.getLogger("bitsandbytes.autograd._functions").isEnabledFor(logging.WARNING)
    assert main(["presets", "list"]) == 0
    assert not logging.getLogger("bitsandbytes.autograd._functions").isEnabledFor(logging.WARNING)


def test_only_the_command_that_is_asked_for_is_imported() -> None:
    code = "from emotrain.cli.app import main; main(['presets', 'list']); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "emotrain.cli.presets" in modules
    assert "emotrain.cli.check" not in modules
    assert "emotrain.cli.run" not in modules


def test_help_imports_what_draws_it_alone() -> None:
    """What it costs then: tests/bench/quickstart.py."""
    code = "from emotrain.cli.app import main; main(['--help']); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = {name.partition(".")[0] for name in done.stdout.split("\n")[-2].split()}
    draws = {"emotrain", "typer", "rich", "pygments", "markdown_it", "mdurl", "click", "shellingham", "annotated_doc"}
    foreign = names - sys.stdlib_module_names - {"__main__", "_distutils_hack"}
    assert "typer" in foreign
    assert foreign <= draws, foreign - draws


def test_completion_offers_commands_and_preset_names() -> None:
    def complete(words: str) -> list[str]:
        process = start(_EMOTRAIN_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
        shown, _ = process.communicate(timeout=300)
        return shown.split()

    assert complete("emotrain re") == ["resume", "report", "replay"]
    assert complete("emotrain check quick") == ["quickstart-flux", "quickstart"]


def test_option_names_are_few_and_known() -> None:
    """Settings belong into the preset: a new flag needs a reason, and a line here."""
    command = typer.main.get_command(build_app())
    context = command.make_context("emotrain", [], resilient_parsing=True)
    flags = {
        name: sorted(
            option
            for parameter in command.get_command(context, name).params  # type: ignore[attr-defined]
            for option in parameter.opts
            if option.startswith("--") and option != "--help"
        )
        for name in ("run", "resume", "check", "doctor")
    }
    assert flags == {
        "run": ["--fail-fast", "--gpus", "--json", "--name", "--plain", "--runs-dir", "--set"],
        "resume": ["--allow-config-change", "--checkpoint", "--gpus", "--json", "--plain", "--runs-dir", "--set"],
        "check": ["--json", "--name", "--runs-dir", "--set"],
        "doctor": ["--json"],
    }


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs wait4")
def test_completion_offers_runs_and_the_presets_that_lie_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emotrain.cli.options import preset_names, run_names

    monkeypatch.chdir(tmp_path)
    assert run_names("") == []
    for name in ("mika", "rose"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "mika.yaml").write_text("")
    assert run_names("") == ["mika", "rose"]
    assert run_names("ro") == ["rose"]
    assert preset_names("mi") == ["mika.yaml"]
    assert "sdxl" in preset_names("s")


@pytest.mark.parametrize("words", [["run", "--help"], ["--help"], ["lora"]])
def test_no_help_is_written_in_a_colour_that_is_lost_on_white(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer import rich_utils

    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(rich_utils, "FORCE_TERMINAL", True)
    main(words)
    styles = [one.split(";") for one in re.findall(r"\x1b\[([\d;]+)m", capsys.readouterr().out)]
    codes = {code for style in styles if "40" not in style for code in style}  # quoted code has a ground of its own
    assert "38" in codes  # there are colours
    assert not codes & {"32", "33", "36", "92", "93", "96"}  # green, yellow, cyan of the 16: a contrast below 2
