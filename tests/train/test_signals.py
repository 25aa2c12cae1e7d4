"""The first signal asks, the second ends, and everything is put back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from emotrain.train import signals
from emotrain.train.signals import StopSignals

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ROOT = Path(signals.__file__).parents[2]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_only_sets_a_flag_that_says_which(number: signal.Signals) -> None:
    observed_loss: list[str] = []
    with StopSignals(on_first=observed_loss.append) as stop:
        assert not stop
        assert stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop
        assert stop.name == number.name
        assert stop.exit_code == (130 if number == signal.SIGINT else 143)
    assert observed_loss == [number.name]


def test_the_handlers_that_were_there_come_back() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with contextlib.suppress(KeyError), StopSignals():
        assert [signal.getsignal(number) for number in NUMBERS] != before
        raise KeyError
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_outside_of_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGINT)
    during = []

    def work() -> None:
        with StopSignals() as stop:
            during.append((signal.getsignal(signal.SIGINT), bool(stop)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert during == [(before, False)]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_key_press_passed_on_twice_counts_once_and_a_closing_terminal_never_quits() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(signals.ECHO_S)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.name == "SIGINT"


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
def test_a_second_signal_ends_the_process_at_once_with_130(second: str) -> None:
    program = f"""
import os, signal, sys, time
from emotrain.train.signals import ECHO_S, StopSignals
with StopSignals(on_quit=lambda: os.write(1, b"cursor back")) as stop:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(ECHO_S + 0.05)
    try:
        os.kill(os.getpid(), signal.{second})
        time.sleep(5)
    finally:
        os.write(1, b"never")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, b"cursor back")
