"""What an emo optimizer writes to TensorBoard by itself, when it is given a writer."""

from __future__ import annotations

from typing import Any, Protocol

from emotrain.pulse.reading import Reading


class Writer(Protocol):
    """A TensorBoard SummaryWriter, or what looks like one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Note one number."""


def write(writer: Writer, reading: Reading, should_stop: bool, step: int) -> None:
    """One step's numbers; the tags are those of muooon's option guide, `trust` and `stop` are ours."""
    numbers = {
        "emoLR/base": reading.pulse,
        "emoLR/Turbo": reading.pulse * reading.drive,
        "emostate/emoDrive": reading.drive,
        "emostate/scalar": reading.scalar,
        "emostate/trust": reading.trust,
        "emostate/stop": float(should_stop),
    }
    for tag, number in numbers.items():
        writer.add_scalar(tag, number, step)
