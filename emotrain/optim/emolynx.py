"""EmoLynx: Lion, the user's learning rate times emoDrive."""

from __future__ import annotations

from typing import ClassVar

from emotrain.optim.emocats import EmoCats


class EmoLynx(EmoCats):
    """EmoLynx 3.6; after muooon's EmoLynx (Apache-2.0). The rule of EmoCats.

    u = sign(b1 m + (1-b1) g);  p -= lr wd p;  p -= lr drive u;  m = b2 m + (1-b2) g
    """

    name: ClassVar[str] = "emolynx"
    generations: ClassVar[tuple[str, ...]] = ("3.6",)
