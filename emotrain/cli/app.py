"""The command line: which commands there are, how they fail, and with which exit code.

Only the command that is asked for is imported, so that `--help` and completion stay quick; the others
are stubs with their line of help.
"""

from __future__ import annotations

import errno
import importlib
import keyword
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import emotrain
from emotrain.cli import output
from emotrain.cli.helptext import colour_help, help_text, shape_group
from emotrain.errors import ConfigError, EmotrainError, ExitCode, Problem, ResourceError
from emotrain.ranks import is_launched, leave

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer exports no name for it
_CONTEXT = {"help_option_names": ["-h", "--help"]}


@dataclass(frozen=True)
class Command:
    """One line of the help. A group's module holds `app`, another's a function of the command's name."""

    name: str
    panel: str
    help: str
    is_group: bool = False

    @property
    def module(self) -> str:
        """Where the command lives."""
        return f"emotrain.cli.{self.function}"

    @property
    def function(self) -> str:
        """The command's name as Python can have it: `verify_resume`, `import_`."""
        name = self.name.replace("-", "_")
        return f"{name}_" if keyword.iskeyword(name) else name


COMMANDS = (
    Command("run", "Train", "Train a LoRA from a preset"),
    Command("resume", "Train", "Resume a run, bit-identical"),
    Command("init", "Prepare", "Look at pictures and model, and write a preset"),
    Command("import", "Prepare", "Make a preset of another trainer's config"),
    Command("check", "Prepare", "Validate a preset, its data and files"),
    Command("plan", "Prepare", "Say what a run needs before it starts"),
    Command("lint", "Prepare", "Find what is wrong with pictures and captions"),
    Command("caption", "Prepare", "Change the captions of a folder, as a diff first"),
    Command("presets", "Prepare", "List, show and copy presets", is_group=True),
    Command("runs", "Inspect", "List, show and compare runs", is_group=True),
    Command("report", "Inspect", "Write one page about a run, or several side by side"),
    Command("images", "Inspect", "Show which pictures a run could not learn"),
    Command("replay", "Inspect", "Replay a loss log through an emo optimizer"),
    Command("verify-resume", "Inspect", "Prove that resume is exact on this machine"),
    Command("doctor", "Inspect", "Report versions, devices and disk"),
    Command("lora", "Files", "Inspect, convert and merge LoRA files", is_group=True),
    Command("cache", "Files", "Show and clear the cache", is_group=True),
)


def _version(wanted: bool) -> None:
    if wanted:
        output.result(f"emotrain {emotrain.__version__}")
        raise typer.Exit()


def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version"),
    ] = False,
) -> None:
    """Train LoRAs for text-to-image models: no learning rate, no schedule, an automatic stop.

    Start here: `emotrain run quickstart`
    """


def build_app(wanted: Sequence[str] | None = None) -> typer.Typer:
    """The command line.

    Args:
        wanted: names of the commands that are imported, None for all; the others are stubs.
    """
    app = typer.Typer(
        name="emotrain",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        pretty_exceptions_show_locals=False,
        rich_markup_mode="markdown",
        context_settings=_CONTEXT,
    )
    app.callback()(root)
    for command in COMMANDS:
        if wanted is None or command.name in wanted:
            _add(app, command)
        else:
            _add_stub(app, command)
    return app


def _add(app: typer.Typer, command: Command) -> None:
    module = importlib.import_module(command.module)
    panel = command.panel
    if command.is_group:
        shape_group(module.app)
        app.add_typer(
            module.app, name=command.name, help=command.help, rich_help_panel=panel,
            no_args_is_help=True, context_settings=_CONTEXT,
        )  # fmt: skip
    else:
        function = getattr(module, command.function)
        text = help_text(function.__doc__)
        app.command(command.name, help=text, rich_help_panel=panel, context_settings=_CONTEXT)(function)


def _add_stub(app: typer.Typer, command: Command) -> None:
    def stub() -> None:
        raise AssertionError(f"{command.name} was called without having been imported")

    app.command(command.name, help=command.help, rich_help_panel=command.panel)(stub)


def _wanted(arguments: Sequence[str]) -> list[str] | None:
    """The command that the arguments name; all of them for completion."""
    if "_EMOTRAIN_COMPLETE" in os.environ:
        words = os.environ.get("COMP_WORDS", "") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
        return words.split()[1:2]
    return [argument for argument in arguments if not argument.startswith("-")][:1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: without the program's name; None takes them from the process.
    """
    output.prepare()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks when it is imported, and at every product
    words = list(sys.argv[1:] if arguments is None else arguments)

    def work() -> int:
        code = _run(words)
        sys.stdout.flush()
        return code

    return leave(guarded(work, as_json="--json" in words))


def guarded(work: Callable[[], int], *, as_json: bool) -> int:
    """Do something that returns an exit code; whatever it raises is told, and has one too."""
    try:
        return work()
    except EmotrainError as failure:
        return _report(failure, as_json)
    except _UsageError as failure:
        if type(failure).__name__ == "NoArgsIsHelpError":
            return ExitCode.USAGE  # the help has been shown
        return _report(_as_config_error(failure), as_json)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        output.reader_gone()
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(bool(ending.code))
    except MemoryError:
        return _report(ResourceError("out of memory", "close other programs, or make the run smaller"), as_json)
    except Exception as failure:
        known = _as_path_error(failure)
        return _report(known, as_json) if known is not None else _report_bug(failure, as_json)


def _as_path_error(failure: Exception) -> EmotrainError | None:
    """A path that the system refuses, wherever it was met; None for everything else."""
    if isinstance(failure, ValueError) and "null" in str(failure) and "embedded" in str(failure):
        return ConfigError("a path or name holds a NUL character, which no file can have")
    if isinstance(failure, RuntimeError) and "home directory" in str(failure):  # of Path.expanduser
        return ConfigError("a path begins with `~` and a name that no user has", "`~/` is your own home folder")
    if not isinstance(failure, OSError):
        return None
    name = output.clean(str(failure.filename or ""))
    shown = name if len(name) <= 120 else f"{name[:60]}...{name[-40:]}"
    if failure.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return ConfigError(f"`{shown}` is no path: {failure.strerror}", "a name has 255 bytes at most")
    if failure.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResourceError(
            f"`{shown}` cannot be used: {failure.strerror}", "who owns it, and may you read and write it?"
        )
    return None


def _run(words: list[str]) -> int:
    if len(words) < 2 or {"-h", "--help"} & set(words):  # what may show help; rich is not imported for the others
        colour_help()
    command = typer.main.get_command(build_app(_wanted(words)))
    code = command.main(args=words, prog_name="emotrain", standalone_mode=False, obj=words)
    return code if isinstance(code, int) else ExitCode.OK


def _report(failure: EmotrainError, as_json: bool) -> int:
    if failure.is_silent:
        return failure.exit_code
    rank = os.environ["RANK"] if is_launched() else "0"
    if rank != "0" and failure.of_rank is None:  # of several the first speaks, and the others where they alone know
        failure.problems = tuple(Problem(f"rank {rank}: {one.message}", one.hint) for one in failure.problems)
    output.error(failure.problems)
    if as_json:
        output.error_json(failure)
    return failure.exit_code


def _as_config_error(failure: Any) -> ConfigError:
    """Typer's usage errors in our shape: one line without full stop, and a hint."""
    parts = re.split(r" Did you mean | \(Possible options?: ", failure.format_message().strip())
    message, suggestion = parts[0], "".join(parts[1:2])
    context = getattr(failure, "ctx", None)
    path = context.command_path if context else "emotrain"
    hint = f"see `{path} --help`"
    if suggestion:
        words = suggestion.strip(" ?)").replace("'", "").split(", ")
        hint = f"did you mean {' or '.join(f'`{word}`' for word in words)}?"
    message = message.strip().rstrip(".").replace("(s)", "").replace("'", "`")
    message = re.sub(r"no such option: (\S+)", r"no such option `\1`", message[:1].lower() + message[1:])
    message = re.sub(r"argument `\w+`", lambda match: match[0].lower(), message)
    return ConfigError(message, hint)


def _report_bug(failure: Exception, as_json: bool) -> int:
    """An exception that nobody expected: the traceback goes to a file, one line to the user."""
    resource = _resource_problem(failure)
    if resource is not None:
        return _report(resource, as_json)
    path = _write_traceback(failure)
    kind = type(failure).__name__
    first = str(failure).strip().split("\n")[0]
    bug = EmotrainError(
        f"emotrain failed unexpectedly: {kind}{': ' + first if first else ''}",
        f"this is our mistake; please report it with {path}",
    )
    return _report(bug, as_json)


def _resource_problem(failure: Exception) -> EmotrainError | None:
    """A full disk or a full GPU is no bug."""
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError("the disk is full", "free some space; finished files are intact")
    if "torch" in sys.modules:
        from emotrain.train.memory import is_out_of_memory

        if is_out_of_memory(failure):
            return ResourceError("out of memory", "`emotrain plan PRESET` shows which settings save memory")
    return None


def _write_traceback(failure: Exception) -> Path:
    """Into the run folder if the exception knows one (`run_dir`), else into a temporary file."""
    import tempfile
    import traceback
    from datetime import datetime

    text = "".join(traceback.format_exception(failure))
    versions = f"emotrain {emotrain.__version__}, Python {sys.version.split()[0]}\n"
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    run_dir = getattr(failure, "run_dir", None)
    if run_dir is not None:
        path = Path(run_dir) / f"traceback-{stamp}.txt"
        try:
            path.write_text(versions + text, encoding="utf-8")
            return path
        except OSError:
            pass  # the temporary folder is left
    handle, name = tempfile.mkstemp(prefix=f"emotrain-{stamp}-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(versions + text)
    return Path(name)
