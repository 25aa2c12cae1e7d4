"""EmoFact: the sign of the gradient, the user's learning rate times emoDrive, without any state."""

from __future__ import annotations

from typing import ClassVar

from emotrain.optim.emoairy import EmoAiry


class EmoFact(EmoAiry):
    """EmoFact 3.6; after muooon's EmoFact (Apache-2.0). The rule of EmoAiry, and for the same reason no state.

    p -= lr wd p;  p -= lr drive sign(g)
    """

    name: ClassVar[str] = "emofact"
    generations: ClassVar[tuple[str, ...]] = ("3.6",)
