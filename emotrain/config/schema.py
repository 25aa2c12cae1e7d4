"""The preset: frozen, strict, described (no torch). The paths in a loaded one are absolute."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic import StrictBool as Bool
from pydantic import StrictStr as Str

from emotrain.config.values import (
    EMO_OPTIMIZERS,
    OPTIMIZERS,
    Auto,
    Count,
    Extension,
    FamilyName,
    Fraction,
    Name,
    OptimizerName,
    Part,
    Pattern,
    Pixels,
    Section,
    Seed,
    Shard,
    Text,
)

__all__ = ["EMO_OPTIMIZERS", "OPTIMIZERS", "FamilyName", "Preset"]


class ModelSection(Section):
    """Which model is trained on, and how it is held in memory."""

    base: Text = Field(description="a .safetensors file, diffusers folder, hub id or builtin: name")
    family: Auto | FamilyName = Field("auto", description="recognised from the files; set it to insist")
    vae: Str | None = Field(None, description="another VAE: a diffusers folder, a hub id or a file")
    text_encoder: Str | None = Field(
        None, description="the text encoder of a model whose parts are separate files: a file or a folder"
    )
    tokenizer: Str | None = Field(
        None, description="a folder with its tokenizer (default: beside the model, or the hub)"
    )
    revision: Str | None = Field(None, description="a hub id's branch, tag or commit")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="of the frozen base; the LoRA itself is always float32"
    )
    quantize: Literal["none", "int8", "nf4", "fp8"] = Field("none", description="of the base")
    quantize_text_encoders: Literal["auto", "none", "int8", "nf4", "fp8"] = Field(
        "auto",
        description="of T5 and language models, which encode the captions and then leave; auto: on a GPU where they do"
        " not fit whole",
    )
    prediction: Literal["auto", "epsilon", "v", "flow"] = Field(
        "auto", description="what the denoiser predicts; set it where the files do not say it or say it wrongly"
    )
    clip_skip: Auto | Annotated[PositiveInt, Field(le=32)] = Field(
        "auto",
        description="SD and SDXL: the layer of CLIP that prompts are taken from, as A1111 counts: 1 the last (SD's),"
        " 2 the last but one (SDXL's)",
    )
    memory: Literal["auto", "24gb", "16gb", "12gb", "8gb"] = Field("auto", description="to fit in")


class Buckets(Section):
    """The sizes that pictures are brought to, in pixels."""

    step: Pixels | None = Field(None, description="sides are multiples of this (default: the model's, mostly 64)")
    min: Pixels | None = Field(None, description="shortest side (default: half the resolution)")
    max: Pixels | None = Field(None, description="longest side (default: one and a half times the resolution)")
    upscale: Bool = Field(False, description="enlarge pictures that are smaller than their bucket")


class Captions(Section):
    """How a caption becomes the text that the model sees."""

    extension: Extension = Field(".txt", description="of the same-stem caption files")
    default: Str | None = Field(None, description="caption of pictures that have none")
    shuffle: Bool = Field(False, description="shuffle the comma-separated tags")
    keep_tokens: Count = Field(
        0, description="first tags that shuffle and tag_dropout leave alone (the trigger always is)"
    )
    dropout: Fraction = Field(0.05, description="share of samples trained without a caption")
    tag_dropout: Fraction = Field(0.0, description="share of tags left out")
    variants: Annotated[PositiveInt, Field(le=1000)] = Field(
        8, description="texts encoded ahead per caption where shuffle or tag_dropout vary it"
    )
    prefix: Str = Field("", description="put before every caption, after the trigger")
    suffix: Str = Field("", description="put after every caption")


class Folder(Section):
    """One folder of pictures."""

    path: Text = Field(description="the folder, or builtin:example")
    repeats: Annotated[PositiveInt, Field(le=100_000)] = Field(1, description="how often an epoch sees each picture")
    flip: Bool = Field(False, description="flip half of the samples left to right")
    mask: Str | None = Field(None, description="a folder of same-stem masks, or `alpha`; white is learned")
    prior: PositiveFloat | None = Field(None, description="regularisation pictures: their loss weight")
    caption: Str | None = Field(None, description="one caption for all pictures of this folder")


class DatasetSection(Section):
    """The pictures and captions."""

    folders: Annotated[tuple[Folder, ...], Field(min_length=1)] = Field(description="where the pictures are")
    balance: Literal["repeats", "equal"] | Annotated[dict[str, PositiveFloat], Field(min_length=1)] = Field(
        "repeats", description="folders by share of the samples, in place of their repeats: `{mika: 0.7, girls: 0.3}`"
    )
    trigger: Str | None = Field(
        None,
        description="word that calls the LoRA: put first, never shuffled; [trigger] in prompts",
    )
    resolution: tuple[Pixels, ...] = Field((), description="one or several, in pixels (default: the model's)")
    buckets: Buckets = Buckets()
    captions: Captions = Captions()
    class_: Text | None = Field(
        None,
        alias="class",
        description="a word such as `woman`: what the model makes of it without the trigger is kept as it was, without"
        " pictures; half of the steps take one more forward and backward pass",
    )
    suspects: Literal["report", "weigh", "leave_out"] = Field(
        "report",
        description="pictures whose captions do not match them: name them at the end; or, from when it shows clearly,"
        " count them a tenth, or leave them out (both show memorised pictures a quarter as often)",
    )
    background: Str = Field("white", description="behind transparent pictures: a colour name or #rrggbb")
    shard: Shard | None = Field(None, description='"1/2": this machine\'s part of the data set')


class NetworkSection(Section):
    """The LoRA."""

    type: Literal["lora", "lokr"] = Field(
        "lora", description="lokr: a Kronecker product in place of two thin matrices; `factor` says how small it is"
    )
    factor: Annotated[PositiveInt, Field(le=4096)] = Field(
        8, description="lokr: rows and columns of the small factor, at most; a larger one makes a smaller file"
    )
    rank: PositiveInt = Field(16, description="lora: rank r of the update matrices")
    alpha: PositiveFloat | None = Field(None, description="lora: strength is alpha / rank (default: rank)")
    targets: Literal["attn", "attn-mlp", "all"] | tuple[Pattern, ...] = Field(
        "attn-mlp", description="a named set, or regular expressions of module names"
    )
    rank_pattern: dict[Pattern, PositiveInt] = Field(
        {}, description="lora: rank of the modules whose name matches a regular expression"
    )
    conv_rank: Count = Field(0, description="lora: rank of the 3x3 convolutions where the targets hold them; 0 = rank")
    text_encoder: Bool = Field(False, description="train the CLIP text encoders too: captions are encoded at each step")


class StackItem(Section):
    """An earlier LoRA that lies frozen under the new one."""

    path: Text = Field(description="a LoRA file, or a run's folder or name")
    weight: float = Field(1.0, description="how strongly it is applied")
    sample: Bool = Field(True, description="also in samples; false for a training adapter of a distilled model")


class StartFrom(Section):
    """Earlier LoRAs to build on."""

    continue_: Str | None = Field(
        None,
        alias="continue",
        description="a LoRA file or run: its weights are where this run starts",
    )
    stack: tuple[StackItem, ...] = Field(
        (), description="LoRA files applied to the base and frozen; a new one is trained on top"
    )


class OptimizerSection(Section):
    """An optimizer and its words; a bare name in place of this section is enough."""

    name: OptimizerName = Field("emosens", description=f"one of {', '.join(OPTIMIZERS)}")
    generation: Literal["3.6", "3.7", "3.7.0", "3.7.6", "3.9"] | None = Field(
        None, description="of the emo mechanism (default: 3.9)"
    )
    use_shadow: Bool = Field(False, description="emo: pull back towards a slow copy")
    eps: PositiveFloat = Field(1e-8, description="kept away from zero in divisions")
    betas: tuple[Part, Part] | None = Field(None, description="decay of the moments (default: the optimizer's own)")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.01, description="decoupled")
    stopcoef: PositiveFloat = Field(0.04, description="emo: threshold of the stop signal")
    sensor: Literal["faithful", "intent"] = Field(
        "faithful", description="emo: as published, or as its text says it is meant"
    )
    bias_correction: Bool = Field(
        True, description="emosens, emonavi: correct the moments' start at zero, as Adam does; false: as published"
    )
    notify: Bool = Field(True, description="emo: say so when the stop signal lights")


class LossSection(Section):
    """What the loss is, and where on the noise scale it is taken."""

    min_snr_gamma: Annotated[PositiveFloat, Field(le=1000)] | None = Field(
        None, description="Hang et al. 2023; SD models only"
    )
    noise_offset: Fraction = Field(0.0, description="SD models only")
    timesteps: Literal["auto", "uniform", "logit-normal"] = Field(
        "auto", description="density of the timesteps; auto: SD uniform, flow logit-normal"
    )
    shift: Auto | PositiveFloat = Field(
        "auto", description="flow models: shift of the timesteps; auto: by the resolution"
    )
    baseline: Literal["auto", "raw", "corrected"] = Field(
        "auto",
        description="the loss the optimizer uses: the loss, begun at the base's mean (auto) or at the first one, as"
        " published (raw), or the loss divided by the base's at its timestep (corrected)",
    )


class TrainSection(Section):
    """The loop."""

    optimizer: OptimizerSection = OptimizerSection()
    lr: PositiveFloat | None = Field(None, description="emo: 1.0 (3.6: 1e-3); other optimizers: required")
    gain: Literal["auto", "fixed"] = Field(
        "auto",
        description="emosens: auto begins at three times the published step length, triples it where ten validations in"
        " a row are surely better, and reduces it to a third, from the best weights, where they stop improving, if"
        " pictures are held out; fixed: as published",
    )
    allow_small_lr: Bool = Field(False, description="emo: take a train.lr below 0.1, which is refused otherwise")
    micro_batch_size: Annotated[PositiveInt, Field(le=1024)] = Field(1, description="pictures in one forward pass")
    gradient_accumulation_steps: Annotated[PositiveInt, Field(le=10_000)] = Field(
        1, description="forward passes in one optimizer step"
    )
    max_steps: Annotated[PositiveInt, Field(le=10**8)] = Field(3000, description="a ceiling, not a target")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="null: no clipping")
    ema: Bool = Field(
        True,
        description="measure, sample and hand over the weights' average over the last tenth of the steps (schedulefree"
        " has its own)",
    )
    gradient_checkpointing: Auto | Bool = Field(
        "auto", description="less memory for a slower step; auto: where it does not fit"
    )
    deterministic: Auto | Bool = Field(
        "auto",
        description="on a GPU only kernels that add up in a fixed order, a little slower; auto: in verify-resume",
    )
    cuda_graphs: Bool = Field(
        False,
        description="on a GPU: start the passes of a step by one launch; for cards that wait for the host. New: each is"
        " held beside the pass it stands for before it is used",
    )
    compile: Auto | Bool = Field(
        "auto",
        description="let torch.compile make kernels of the model's blocks: minutes at the start for a shorter step;"
        " auto: no, until it is known to pay on a GPU",
    )
    seed: Seed = Field(
        42, description="the same seed on the same machine gives the same bytes; on a GPU with `deterministic: true`"
    )
    loss: LossSection = LossSection()


class StopSection(Section):
    """When the run stops automatically."""

    mode: Literal["off", "signal", "trusted"] = Field(
        "trusted",
        description="off: max_steps; signal: the published signals; trusted: signals and validation",
    )
    min_steps: Auto | PositiveInt = Field("auto", description="never before this step")


class ValidateSection(Section):
    """The validation: pictures at fixed noise and timesteps."""

    every: Auto | PositiveInt = Field(
        "auto",
        description="steps between two validations; auto: so that they take 5 % of the run, 10 % of a built-in model's,"
        " twice that with train.gain: auto",
    )
    probe_images: Annotated[PositiveInt, Field(le=10_000)] = Field(4, description="pictures in the validation")
    folder: Str | None = Field(None, description="a held-out folder of your own")
    fraction: Auto | Part = Field(
        "auto",
        description="share of the pictures held out; auto: 3 of 12 and more, 4 of 24 and more; 0: none",
    )
    likeness: Text | None = Field(
        None,
        description="a folder of a CLIP or DINO vision model in transformers form: at each sampling, how alike samples"
        " and held-out (else training) pictures are to it",
    )


class SampleSection(Section):
    """Pictures drawn during the run."""

    base: Text | None = Field(
        None,
        description="draw on another model of the family, with the LoRA on it: train on Raw or Base, look on Turbo. A"
        " file, diffusers folder or hub id (default: the model that is trained)",
    )
    every: Count = Field(250, description="steps between two sheets; 0: none")
    at_start: Bool = Field(True, description="also before the first step")
    seed: Seed = Field(42, description="of the pictures' noise, the same for every sheet")
    steps: Auto | Annotated[PositiveInt, Field(le=1000)] = Field(
        "auto", description="denoising steps of one picture; auto: 20, and of a distilled model as many as it takes"
    )
    guidance: Auto | Annotated[float, Field(ge=0.0)] = Field(
        "auto", description="classifier-free guidance; auto: the family's, and none for a distilled model"
    )
    size: Pixels | None = Field(None, description="of the pictures, in pixels (default: the first resolution)")
    prompts: tuple[Str, ...] = Field(
        ("[trigger]",),
        description="one picture each, or a file with one a line; [trigger] is replaced, and --n --w --h --d --l --s"
        " give negative prompt, width, height, seed, guidance and steps",
    )
    strengths: tuple[Annotated[float, Field(gt=0.0, le=4.0)], ...] = Field(
        (), description="after the run also draw with the LoRA file at these strengths, such as [0.6, 0.8]"
    )


class SaveSection(Section):
    """Checkpoints and the LoRA file."""

    every: PositiveInt = Field(250, description="steps between two checkpoints")
    keep_last: Annotated[int, Field(ge=2)] = Field(3, description="checkpoints kept besides the best")
    format: Literal["auto", "kohya", "diffusers", "comfyui"] = Field(
        "auto", description="the key layout; auto: the one that every reader of the family loads"
    )
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="of the LoRA file; checkpoints hold float32")


class LogSection(Section):
    """Logs besides metrics.jsonl."""

    tensorboard: Bool = Field(True, description="write event files for TensorBoard")
    every: PositiveInt = Field(10, description="steps between two plain lines")
    notify: Text | None = Field(
        None, description="a command of your shell, run when the run has ended, with the result as JSON on its stdin"
    )


class Preset(Section):
    """A whole run. `model` and `dataset` are enough."""

    name: Name = Field("run", description="of the run (default: the preset's file name)")
    model: ModelSection
    dataset: DatasetSection
    network: NetworkSection = NetworkSection()
    start_from: StartFrom = StartFrom()
    train: TrainSection = TrainSection()
    stop: StopSection = StopSection()
    validate_: ValidateSection = Field(ValidateSection(), alias="validate")
    sample: SampleSection = SampleSection()
    save: SaveSection = SaveSection()
    log: LogSection = LogSection()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings under the preset's own keys."""
        return self.model_dump(mode="json", by_alias=True)

    def to_share(self) -> dict[str, Any]:
        """As `to_dict`, for files that people give away: without the command of `log.notify` and what it may hold."""
        return self.model_copy(update={"log": self.log.model_copy(update={"notify": None})}).to_dict()
