"""What a LoRA file says about the run that made it: no path, no user name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from emotrain import __version__
from emotrain.dataset.captions import split_tags
from emotrain.dataset.examples import Example
from emotrain.lora.metadata import About, build_metadata
from emotrain.runs.loaded import Loaded
from emotrain.train.loop import Outcome
from emotrain.train.state import TrainState

DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


def tag_frequency(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """Folder name -> tag -> how many of its pictures have it."""
    counts: dict[str, Counter[str]] = {}
    for example in examples:
        tags = {tag for caption in example.captions for tag in split_tags(caption)}
        counts.setdefault(folder_name(example), Counter()).update(tags)
    return {name: dict(counter) for name, counter in counts.items()}


def folder_name(example: Example) -> str:
    """The last part of the folder that a picture lies in."""
    return example.path.parent.name


def lora_metadata(loaded: Loaded, state: TrainState, step: int, outcome: Outcome) -> dict[str, str]:
    """Header strings of the file that holds the weights of `step`.

    No time of day is among them: the same seed on the same machine gives the same bytes; run.json has the times.
    """
    preset, adapter, data = loaded.preset, loaded.model.adapter, loaded.data.train
    train, loss = preset.train, preset.train.loss
    sizes = Counter(placement.size for placement in data.placements())
    examples = loaded.pictures.train
    settings: tuple[object, int] = (preset.network.targets, preset.network.conv_rank)
    if preset.start_from.continue_ is not None:  # the earlier LoRA's, whatever the preset says
        settings = ("continued", 0)
    return build_metadata(
        About(
            family=loaded.found.family,
            variant=loaded.found.variant,
            name=preset.name,
            rank=adapter.rank or None,
            alpha=adapter.alpha,
            factor=adapter.factor,
            network_args={"targets": settings[0], "conv_rank": settings[1]},
            base_name=Path(preset.model.base).name,
            base_sha256=loaded.model.base_digest,
            prediction=loaded.found.prediction,
            clip_skip=loaded.model.family.clip_skip or None,
            trigger=preset.dataset.trigger,
            tag_frequency=tag_frequency(examples),
            folders={name: (max(e.repeats for e in group), len(group)) for name, group in by_folder(examples).items()},
            buckets=[(width, height, count) for (width, height), count in sorted(sizes.items())],
            num_images=data.num_images,
            num_reg_images=sum(example.prior for example in examples),
            resolution=(loaded.size, loaded.size),
            steps=step,
            max_steps=train.max_steps,
            epochs=step * state.micro_batches / data.batches_per_epoch,
            micro_batch_size=train.micro_batch_size,
            gradient_accumulation_steps=state.micro_batches,
            seed=train.seed,
            optimizer=train.optimizer.name,
            lr=train.lr if train.lr is not None else 1.0,
            text_encoder=preset.network.text_encoder,
            dtype=DTYPES[str(loaded.model.family.dtype)],
            min_snr_gamma=loss.min_snr_gamma,
            noise_offset=loss.noise_offset or None,
            preset=preset.to_share(),
            dataset_sha256=loaded.dataset_digest,
            parents=[{key: one[key] for key in ("kind", "sha256", "weight")} for one in loaded.model.parents],
            stop_reason=str(outcome.reason),
            best_step=state.best_step,
            version=__version__,
            extra={"stop_sentence": outcome.sentence},
        )
    )


def by_folder(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Pictures by the name of their folder."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(folder_name(example), []).append(example)
    return groups
