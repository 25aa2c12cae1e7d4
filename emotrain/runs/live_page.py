"""The page of a run while it runs: written again after validations and samples, for a share of the run's time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from emotrain.dataset.examples import Example
from emotrain.runs.folder import RunFolder
from emotrain.runs.report import PAGE, Previews, write_page
from emotrain.train.events import Event, LikenessMeasured, Notice, RunStart, SamplesDrawn, ValidationEnd

SHARE = 0.01  # of a run's time, at most
FIRST_S = 0.2  # what the first page is expected to take
PREVIEWS_S = 0.5  # seconds that one page may take for new previews
REFRESH_S = 30  # seconds after which an open page loads itself again


class LivePage:
    """An observer that keeps `report.html` up to date.

    A page is no reason to fail: the first error is said, and no other page is written.

    Args:
        folder: of the run.
        examples: its pictures.
        notify: told of an error.
        clock: seconds.
    """

    def __init__(
        self,
        folder: RunFolder,
        examples: Sequence[Example],
        notify: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.examples = examples
        self.notify = notify
        self.clock = clock
        self.previews = Previews(PREVIEWS_S)
        self.started = 0.0
        self.spent = 0.0
        self.expected = FIRST_S
        self.on = True

    def handle(self, event: Event) -> None:
        """Write the page where something new can be seen and its share of the time is not used up."""
        if isinstance(event, RunStart):
            self.started = self.clock()
        elif isinstance(event, ValidationEnd | SamplesDrawn | LikenessMeasured) and self.on and self.is_due():
            self.write()

    def is_due(self) -> bool:
        """Whether another page keeps within SHARE of the time since the run's start."""
        return self.spent + self.expected <= SHARE * (self.clock() - self.started)

    def write(self) -> None:
        """The page of what there is now, in place of the one before it as a whole."""
        begun = self.clock()
        if reason := write_page(self.folder, self.examples, self.previews, REFRESH_S):
            self.on = False
            self.notify(Notice(f"{PAGE} is not kept up to date: {reason}"))
        self.expected = self.clock() - begun
        self.spent += self.expected

    def close(self) -> None:
        """Nothing is open."""
