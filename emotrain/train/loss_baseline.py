"""The loss the optimizer uses: the raw loss, or the loss corrected for where on the noise scale it was taken.

Its averages should begin at what the base's loss is in the mean. The first loss of a run is one draw, often off by a
fifth; the slowest average carries that for a hundred steps, and the emotion takes it for progress, or for its absence.

A loss of 0.9 says nothing by itself: at one end of the noise scale that is usual, at the other it is terrible. The
corrected loss divides every sample's loss by what the base model has at that position, relative to its mean: a loss as
the base's is observed as the base's mean, so that absolute bounds (`stopcoef`) keep their sense. Only what the
optimizer observes is corrected; the gradient is that of the raw loss and stays unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

BINS = 20


@dataclass
class LossBaseline:
    """Turns the losses of one step into the number that the optimizer observes.

    Args:
        expected: the base's loss in `BINS` equal parts of the noise scale, over its mean; empty for the raw loss.
        start: what is observed of the base in the mean, where the averages begin; None: at the first loss.
    """

    expected: list[float] = field(default_factory=list)
    start: float | None = None

    def observe(self, positions: Sequence[float], losses: Sequence[float]) -> float:
        """Mean over the samples of one step, each divided by the expected loss at its position (0..1)."""
        if not self.expected:
            return sum(losses) / len(losses)
        parts = [loss / self._at(position) for position, loss in zip(positions, losses, strict=True)]
        return sum(parts) / len(parts)

    def _at(self, position: float) -> float:
        """Expected loss, linear between the centres of the bins."""
        place = min(max(position * BINS - 0.5, 0.0), BINS - 1.0)
        low = min(int(place), BINS - 2)
        share = place - low
        return max((1 - share) * self.expected[low] + share * self.expected[low + 1], 1e-8)


def expected_by_bins(positions: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Mean loss in each of `BINS` parts of the noise scale, over the mean of all.

    Empty parts take their nearest neighbour's.

    Raises:
        ValueError: no losses.
    """
    sums, counts = [0.0] * BINS, [0] * BINS
    for position, loss in zip(positions, losses, strict=True):
        part = min(int(position * BINS), BINS - 1)
        sums[part] += loss
        counts[part] += 1
    filled = [i for i in range(BINS) if counts[i]]
    if not filled:
        raise ValueError("no losses to learn the expected loss from")
    nearest = [min(filled, key=lambda j: abs(i - j)) for i in range(BINS)]
    mean = sum(losses) / len(losses)
    return [sums[j] / counts[j] / mean for j in nearest]
