"""What the tests of LoRA files share; the tiny models are in tiny_models.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def lora_path(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"


@pytest.fixture
def rng_untouched() -> Callable[[], bool]:
    """Call it at the end: whether the global generator is where it was."""
    before = torch.get_rng_state()
    return lambda: torch.equal(before, torch.get_rng_state())
