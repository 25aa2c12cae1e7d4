from __future__ import annotations

import io
import subprocess
import sys

import pytest

from emotrain.observers.choose import choose_display, display_observers
from emotrain.observers.console import ConsoleLines, JsonEvents
from emotrain.observers.dashboard import Dashboard
from emotrain.train.events import Notice


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "display"),
    [
        ({}, "dashboard"),
        ({"TERM": "xterm-256color"}, "dashboard"),
        ({"NO_COLOR": "1"}, "dashboard"),
        ({"CI": "true"}, "plain"),
        ({"CI": "false"}, "dashboard"),
        ({"CI": ""}, "dashboard"),
        ({"TERM": "dumb"}, "plain"),
    ],
)
def test_a_terminal_has_the_dashboard_unless_it_cannot_show_it(environ: dict[str, str], display: str) -> None:
    assert choose_display(stream=Tty(), environ=environ) == display


def test_force_color_does_not_make_a_terminal_of_a_pipe() -> None:
    environ = {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TERM": "xterm"}
    assert choose_display(stream=io.StringIO(), environ=environ) == "plain"
    closed = Tty()
    closed.close()
    assert choose_display(stream=io.StringIO(), environ={}) == "plain"


def test_flags_go_before_the_terminal() -> None:
    assert choose_display(plain=True, stream=Tty(), environ={}) == "plain"
    assert choose_display(json=True, plain=True, stream=Tty(), environ={}) == "json"


def test_json_writes_events_on_stdout_and_only_warnings_on_stderr() -> None:
    out, err = io.StringIO(), Tty()
    observers = display_observers(json=True, stdout=out, stderr=err, environ={})
    assert [type(observer) for observer in observers] == [JsonEvents, ConsoleLines]
    for observer in observers:
        observer.handle(Notice("careful"))
        observer.close()
    assert out.getvalue() == '{"event": "notice", "message": "careful", "level": "warning"}\n'
    assert err.getvalue() == "warning: careful\n"


def test_the_dashboard_draws_on_the_terminal_that_was_asked() -> None:
    err = Tty()
    (observer,) = display_observers(stderr=err, environ={"TERM": "xterm"})
    assert isinstance(observer, Dashboard)
    observer.close()
    assert "emotrain" in err.getvalue()
    (observer,) = display_observers(stderr=io.StringIO(), environ={})
    assert isinstance(observer, ConsoleLines)


@pytest.mark.parametrize(
    "modules",
    [
        "emotrain.train.events",
        "emotrain.observers.choose, emotrain.observers.dashboard, emotrain.observers.console, "
        "emotrain.observers.metrics_log, emotrain.observers.sheet, emotrain.observers.tensorboard",
    ],
)
def test_watching_needs_no_torch(modules: str) -> None:
    code = f"import sys; import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
