"""For all tests: no network, no colour, no user's cache; slow and gpu tests only when asked for."""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models are tiny: a second thread gives nothing, and where cores are busy the two wait for each other for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Models are many objects and few circles: a fifth of the time went into looking for circles.
gc.set_threshold(50_000, 20, 20)
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("quick")
# What a shell runs in the background, or under nohup, begins with these ignored; tests send them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: a process for each core, at most four, as one may need 2 GB."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave `slow` and `gpu` tests out unless `-m` names them or the test is named by its id."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: these tests are of the CPU
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    for item in items:
        for marker in ("slow", "gpu"):
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: run with -m {marker}"))


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No connection leaves the machine; the cache is a temporary one; terminals are plain."""

    def refuse(self: socket.socket, address: object) -> None:
        if self.family != getattr(socket, "AF_UNIX", None):
            raise AssertionError(f"a test tried to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("EMOTRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture(scope="session")
def counted() -> dict[str, Any]:
    """Activation memory that was counted, by what it was counted for."""
    return {}


@pytest.fixture(scope="module")
def counted_once(counted: dict[str, Any]) -> Iterator[None]:
    """`plan` counts the same passes once: that takes a second, at real size three to ten."""
    from emotrain.runs import plan

    measure = plan.measure

    def once(family: str, config: dict[str, Any], **words: Any) -> Any:
        asked = repr((family, sorted(config.items()), sorted(words.items())))
        if asked not in counted:
            counted[asked] = measure(family, config, **words)
        return counted[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "measure", once)
        yield


@pytest.fixture
def pictures_dir(tmp_path: Path) -> Path:
    """A folder of three tiny captioned PNGs."""
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} square, {index}", encoding="utf-8")
    return folder
