"""The preset: frozen, strict, described. Paths in it are absolute once `load_preset` has resolved them (no torch)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, StrictBool, StrictStr

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FamilyName = Literal["sd15", "sd21", "sdxl", "sd3", "flux"]
OPTIMIZERS = (
    "emosens", "emoairy", "emocats", "emonavi", "emofact", "emolynx", "emotion", "emovoid",
    "adamw", "lion", "prodigy", "schedulefree", "adafactor",
)  # fmt: skip
EMO_OPTIMIZERS = OPTIMIZERS[:8]


class Section(BaseModel):
    """Base of all sections: no unknown key, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model is trained on, and how it is held in memory."""

    base: StrictStr = Field(description="a .safetensors file, a diffusers folder, a hub id, or builtin:tiny-sd | builtin:tiny-flux")
    family: Auto | FamilyName = Field("auto", description="recognised from the files; set it only to be told when it is another one")
    vae: StrictStr | None = Field(None, description="another VAE: a diffusers folder, a hub id or a file")
    revision: StrictStr | None = Field(None, description="a hub id's branch, tag or commit")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="of the frozen base; the LoRA is always float32")
    quantize: Literal["none", "int8", "nf4", "fp8"] = Field("none", description="of the frozen base")
    memory: Literal["auto", "24gb", "16gb", "12gb", "8gb"] = Field("auto", description="the GPU to fit into")


class Buckets(Section):
    """The sizes that pictures are brought to, in pixels."""

    step: PositiveInt | None = Field(None, description="sides are multiples of this (default: the family's, 64)")
    min: PositiveInt | None = Field(None, description="shortest side (default: half the resolution)")
    max: PositiveInt | None = Field(None, description="longest side (default: one and a half times the resolution)")
    upscale: StrictBool = Field(False, description="enlarge pictures that are smaller than their bucket")


class Captions(Section):
    """How a caption becomes the text that the model sees."""

    extension: StrictStr = Field(".txt", description="of the same-stem caption files")
    default: StrictStr | None = Field(None, description="caption of pictures that have none")
    shuffle: StrictBool = Field(False, description="shuffle the comma-separated tags")
    keep_tokens: Annotated[int, Field(ge=0)] = Field(0, description="first tags that shuffle and tag_dropout leave alone (the trigger always is)")
    dropout: Fraction = Field(0.05, description="share of samples trained without a caption")
    tag_dropout: Fraction = Field(0.0, description="share of tags left out")
    variants: PositiveInt = Field(8, description="texts encoded ahead per caption where shuffle, tag_dropout or wildcards vary it")
    prefix: StrictStr = Field("", description="put before every caption, after the trigger")
    suffix: StrictStr = Field("", description="put after every caption")


class Folder(Section):
    """One folder of pictures."""

    path: StrictStr = Field(description="the folder, or builtin:example")
    repeats: PositiveInt = Field(1, description="how often an epoch sees each picture")
    flip: StrictBool = Field(False, description="mirror half of the samples")
    mask: StrictStr | None = Field(None, description="a folder of same-stem masks, or `alpha`; white is learned")
    prior: PositiveFloat | None = Field(None, description="regularisation pictures: their loss weight")
    caption: StrictStr | None = Field(None, description="one caption for all pictures of this folder")


class DatasetSection(Section):
    """The pictures and captions."""

    folders: Annotated[tuple[Folder, ...], Field(min_length=1)]
    trigger: StrictStr | None = Field(None, description="word that calls the LoRA: put first, never dropped or shuffled; [trigger] in prompts")
    resolution: tuple[PositiveInt, ...] = Field((), description="one or several, in pixels (default: the model's)")
    buckets: Buckets = Buckets()
    captions: Captions = Captions()
    background: StrictStr = Field("white", description="behind transparent pictures: a colour name or #rrggbb")
    shard: Annotated[str, Field(pattern=r"^\d+/\d+$")] | None = Field(None, description='"1/2": this machine\'s part of the data set')


class NetworkSection(Section):
    """The LoRA."""

    type: Literal["lora"] = "lora"
    rank: PositiveInt = Field(16, description="rank r of the update matrices")
    alpha: PositiveFloat | None = Field(None, description="strength is alpha / rank (default: rank)")
    targets: Literal["attn", "attn-mlp", "all"] | tuple[StrictStr, ...] = Field("attn-mlp", description="a named set, or regular expressions of module names")
    rank_pattern: dict[StrictStr, PositiveInt] = Field({}, description="rank of the modules whose name matches a regular expression")
    conv_rank: Annotated[int, Field(ge=0)] = Field(0, description="rank of the 3x3 convolutions where the targets hold them; 0 = rank")
    text_encoder: StrictBool = Field(False, description="train the CLIP text encoders too (captions are then not cached)")


class StackItem(Section):
    """An earlier LoRA that lies frozen under the new one."""

    path: StrictStr
    weight: float = 1.0


class StartFrom(Section):
    """Earlier LoRAs to build on."""

    continue_: StrictStr | None = Field(None, alias="continue", description="a LoRA file or run: its weights are where this run starts")
    stack: tuple[StackItem, ...] = Field((), description="LoRA files applied to the base and frozen; a new one is trained on top")


class OptimizerSection(Section):
    """An emo optimizer and its words; a bare name is enough."""

    name: StrictStr = "emosens"
    generation: Literal["3.6", "3.7", "3.7.0", "3.7.6", "3.9"] | None = None
    use_shadow: StrictBool = False
    eps: PositiveFloat = 1e-8
    betas: tuple[Fraction, Fraction] | None = None
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    stopcoef: PositiveFloat = 0.04
    sensor: Literal["faithful", "intent"] = "faithful"
    notify: StrictBool = True


class LossSection(Section):
    """What the loss is, and where on the noise scale it is taken."""

    min_snr_gamma: PositiveFloat | None = Field(None, description="Hang et al. 2023; SD models only")
    noise_offset: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.0, description="SD models only")
    timesteps: Literal["auto", "uniform", "logit-normal"] = Field("auto", description="density of the timesteps; auto: SD uniform, flow logit-normal")
    shift: Auto | PositiveFloat = Field("auto", description="flow models: shift of the timesteps; auto: by the resolution")
    ear: Literal["auto", "raw", "corrected"] = Field("auto", description="what the emotion hears: the raw loss, or the loss corrected for its timesteps")


class TrainSection(Section):
    """The loop."""

    optimizer: OptimizerSection = OptimizerSection()
    lr: PositiveFloat | None = Field(None, description="emo: 1.0 (3.6: 1e-3); other optimizers: required")
    micro_batch_size: PositiveInt = 1
    gradient_accumulation_steps: PositiveInt = 1
    max_steps: PositiveInt = Field(3000, description="a ceiling, not a target")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="null: no clipping")
    gradient_checkpointing: Auto | StrictBool = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    loss: LossSection = LossSection()


class StopSection(Section):
    """When the run ends by itself."""

    mode: Literal["off", "signal", "trusted"] = Field("trusted", description="off: max_steps; signal: the published signals; trusted: signals and probe")
    min_steps: Auto | PositiveInt = Field("auto", description="never before this step")


class ValidateSection(Section):
    """The probe: pictures at fixed noise and timesteps."""

    every: PositiveInt = Field(50, description="steps between two probes")
    probe_images: PositiveInt = Field(4, description="pictures in the probe")
    folder: StrictStr | None = Field(None, description="a held-out folder of your own")
    fraction: Auto | Fraction = Field("auto", description="share of the pictures held out; auto: 3 where there are at least 12; 0: none")


class SampleSection(Section):
    """Pictures drawn during the run."""

    every: Annotated[int, Field(ge=0)] = Field(250, description="steps between two sheets; 0: none")
    at_start: StrictBool = True
    seed: Annotated[int, Field(ge=0)] = 42
    steps: PositiveInt = 20
    guidance: Auto | Annotated[float, Field(ge=0.0)] = "auto"
    size: PositiveInt | None = Field(None, description="of the pictures, in pixels (default: the first resolution)")
    prompts: tuple[StrictStr, ...] = ("[trigger]",)


class SaveSection(Section):
    """Checkpoints and the LoRA file."""

    every: PositiveInt = Field(250, description="steps between two checkpoints")
    keep_last: Annotated[int, Field(ge=2)] = Field(3, description="checkpoints kept besides the best")
    format: Literal["auto", "kohya", "diffusers"] = "auto"
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"


class LogSection(Section):
    """Logs besides metrics.jsonl."""

    tensorboard: StrictBool = True
    every: PositiveInt = Field(10, description="steps between two plain lines")


class Preset(Section):
    """A whole run. `model` and `dataset` are enough."""

    name: StrictStr = "run"
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
