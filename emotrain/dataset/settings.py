"""The words of a preset's data set that the loader, `plan` and lint go by (no torch)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from emotrain.config.schema import DatasetSection
from emotrain.dataset.buckets import BucketRules
from emotrain.dataset.captions import plain, variants
from emotrain.dataset.examples import Example
from emotrain.errors import ConfigError


@dataclass(frozen=True)
class LoaderSettings:
    """The words of the preset's `dataset` section that the loader goes by."""

    rules: BucketRules
    micro_batch_size: int = 1
    seed: int = 42
    background: str = "white"
    trigger: str | None = None
    shuffle: bool = False
    keep_tokens: int = 0
    dropout: float = 0.05
    tag_dropout: float = 0.0
    variants: int = 8
    prefix: str = ""
    suffix: str = ""
    shard: str | None = None
    class_word: str | None = None
    text_memory: int = 4 * 2**30  # bytes of text embeddings held in memory; the rest stays in the cache
    encode_texts: bool = True  # False where the text encoders are trained

    def texts(self, example: Example) -> tuple[str, ...]:
        """All texts of an example; the first is its plain caption.

        Regularisation pictures show what the trigger must not mean: they go without it.
        """
        return variants(
            example.captions,
            trigger=None if example.prior else self.trigger,
            shuffle=self.shuffle,
            keep_tokens=self.keep_tokens,
            tag_dropout=self.tag_dropout,
            prefix=self.prefix,
            suffix=self.suffix,
            count=self.variants,
            seed=self.seed,
        )

    def class_text(self, example: Example) -> str:
        """The plain caption with the class word in the trigger's place: what the LoRA must leave alone."""
        if self.class_word is None or example.prior:
            return self.texts(example)[0]
        own = re.escape((self.trigger or "").strip())
        without = re.sub(rf"(?<!\w){own}(?!\w)", self.class_word, example.captions[0], flags=re.IGNORECASE)
        return plain(without, trigger=self.class_word, prefix=self.prefix, suffix=self.suffix)


def settings_from(
    section: DatasetSection,
    *,
    resolution: int,
    step: int,
    micro_batch_size: int = 1,
    seed: int = 42,
    encode_texts: bool = True,
) -> LoaderSettings:
    """Settings of a preset's section; it falls back on the family's `resolution` and `step`.

    Raises:
        ConfigError: bucket sizes that contradict each other.
    """
    buckets, words = section.buckets, section.captions
    try:
        rules = BucketRules(
            section.resolution or (resolution,),
            buckets.step or step,
            buckets.min,
            buckets.max,
            buckets.upscale,
        )
    except ValueError as error:
        raise ConfigError(f"dataset.buckets cannot be made: {error}", "leave min and max out") from error
    if rules.step % step:
        reason = f"dataset.buckets.step is {rules.step}, which is not a multiple of {step}"
        raise ConfigError(reason, f"the model takes sides that are multiples of {step}")
    return LoaderSettings(
        rules=rules,
        micro_batch_size=micro_batch_size,
        seed=seed,
        background=section.background,
        trigger=section.trigger,
        shuffle=words.shuffle,
        keep_tokens=words.keep_tokens,
        dropout=words.dropout,
        tag_dropout=words.tag_dropout,
        variants=words.variants,
        prefix=words.prefix,
        suffix=words.suffix,
        shard=section.shard,
        class_word=section.class_,
        encode_texts=encode_texts,
    )
