"""How the dashboard draws."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """How to draw."""

    ascii: bool = False

    @property
    def dash(self) -> str:
        """Between the two ends of a range."""
        return "-" if self.ascii else "–"
