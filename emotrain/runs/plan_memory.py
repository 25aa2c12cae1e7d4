"""The numbers behind a plan: memory by part, what switches save, disk."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from emotrain.batch import AT_ONCE
from emotrain.config.schema import Preset
from emotrain.families.headers import read_header
from emotrain.families.memory import (
    AWAY,
    BACKENDS,
    CONTEXT_GIB,
    GIB,
    SPARE,
    TILE,
    VAES,
    EncoderNeeds,
    MemoryPlan,
    Needs,
    choose_memory,
    installed_backends,
    weights_gib,
)
from emotrain.families.registry import FAMILIES, configs
from emotrain.families.sniff import Sniffed
from emotrain.families.sniff_file import own_config
from emotrain.families.stored import stored_parameters
from emotrain.families.texts import encoder_parameters, quantizable_parameters, trainable_encoders, wide_parameters
from emotrain.runs.activation_memory import ActivationMemory
from emotrain.runs.build import VALIDATION_DRAWS, build_optimizer_of
from emotrain.runs.sample_base import Other
from emotrain.train.validation import SMALL

EVERY_BACKEND = frozenset(BACKENDS)


def state_bytes_per_number(preset: Preset) -> float:
    """Bytes of optimizer state for each trained number, measured on a small pair of weights."""
    rank = 16
    parameters = [nn.Parameter(torch.randn(s, generator=torch.Generator())) for s in ((rank, 640), (640, rank))]
    optimizer = build_optimizer_of(preset, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.observe(1.0)
    optimizer.step()
    states = optimizer.state_dict().get("state", {})
    tensors = [t for state in states.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / (2 * rank * 640)


def vae_width(found: Sniffed) -> int:
    """Channels of the VAE's maps at full size: of a folder its own, else the public model's."""
    config = own_config(found, "vae/config.json", configs(found.family)["vae"])
    widths = config.get("block_out_channels") or [config.get("base_dim") or 128]
    return int(widths[0])


def vae_halves(found: Sniffed) -> tuple[float, float]:
    """GiB of the VAE's decoder and encoder in float32: of a folder of no public size its own, else the public model's.

    Raises:
        ModelError: a file of it that cannot be read.
    """
    folder = Path(found.path) / "vae"
    files = sorted(folder.glob("*.safetensors")) if found.variant == "custom" and found.kind == "folder" else []
    shapes = {name: shape for file in files for name, shape in read_header(file).shapes.items()}
    if not shapes:
        public = VAES[FAMILIES[found.family].vae_class]
        return public.decoder, public.encoder
    sizes = {name: math.prod(shape) * 4 / GIB for name, shape in shapes.items()}
    encoder = sum(gib for name, gib in sizes.items() if name.startswith(("encoder.", "quant_conv.")))
    return sum(sizes.values()) - encoder, encoder


class Memory:
    """The numbers behind the parts, the verdicts and what each switch saves."""

    def __init__(
        self,
        preset: Preset,
        found: Sniffed,
        kept: ActivationMemory,
        dtype: torch.dtype,
        free: float | None,
        other: Other | None = None,
    ) -> None:
        self.preset, self.found, self.kept, self.itemsize, self.free = preset, found, kept, dtype.itemsize, free
        self.other = other
        self.trained = kept.num_trained
        stored = stored_parameters(found, preset.model.text_encoder)
        self.stored = stored.get("", 0)
        self.other_stored = stored_parameters(other.found).get("", 0) if other else 0
        self.state_bytes = state_bytes_per_number(preset)
        linear, wide = quantizable_parameters(found), wide_parameters(found) if dtype == torch.float16 else {}
        self.encoders = tuple(
            EncoderNeeds(name, count, linear.get(name, 0), stored.get(name, 0), wide.get(name, 0))
            for name, count in encoder_parameters(found).items()
        )
        self.resident = kept.text.num_parameters * self.itemsize / GIB  # trained ones are not freed
        self.vae_class = FAMILIES[found.family].vae_class
        self.vae, self.vae_encoder = vae_halves(found)

    def lora(self) -> float:
        """Weights and gradients, float32; on a half-precision base a copy and gradients in its dtype too."""
        return self.trained * (8 if self.itemsize == 4 else 12) / GIB

    def tables(self) -> float:
        """What the denoiser, and the one for samples, have besides parameters."""
        return self.kept.tables * self.itemsize / GIB * (1 if self.other is None else 2)

    def state(self) -> float:
        """Optimizer state."""
        return self.trained * self.state_bytes / GIB

    def checkpoint(self) -> float:
        """The LoRA and the optimizer's state, as a checkpoint has them."""
        return self.trained * 4 / GIB + self.state()

    def activations(self, checkpointing: bool) -> float:
        """Peak of activations in GiB."""
        return (self.kept.checkpointed if checkpointing else self.kept.plain) / GIB

    def needs(self) -> Needs:
        """What each stage of the run asks for."""
        found, kept, sample = self.found, self.kept, self.preset.sample
        trained = trainable_encoders(found) if self.preset.network.text_encoder else {}
        _, _, *sides = kept.latents
        area = sides[0] * sides[1]
        side = (sample.size or (*self.preset.dataset.resolution, found.resolution)[0]) // found.vae_scale
        drawn = side**2 if sample.every and sample.prompts else 0
        wide = VALIDATION_DRAWS * self.preset.validate_.probe_images if area * found.latent_channels <= SMALL else 1
        forward = kept.forward / area / GIB
        at_once = 1 if found.denoiser_config.get("guidance_embeds") else 2  # classifier-free guidance has two passes
        share = weights_gib(kept.num_parameters, self.itemsize, stored=self.stored) / weights_gib(
            kept.num_parameters, self.itemsize
        )
        return Needs(
            num_parameters=kept.num_parameters,
            bytes_per_parameter=self.itemsize,
            activations=(self.activations(False), self.activations(True)),
            trained=self.lora() + self.state() + self.resident,
            encoders=tuple(encoder for encoder in self.encoders if encoder.name not in trained),
            vae=self.vae,
            vae_encoder=self.vae_encoder,
            encode=self.vae_pass(VAES[self.vae_class].encode_maps, area),
            decode=self.vae_pass(VAES[self.vae_class].decode_maps, drawn),
            validate=wide * forward * area,
            sample=at_once * forward * drawn,
            saved=self.state() + min(self.state() + self.lora(), AT_ONCE / GIB),
            stored=self.stored,
            tables=self.tables(),
            linear=kept.linear,
            other_parameters=self.other.num_parameters if self.other else 0,
            other_linear=self.other.linear if self.other else None,
            other_stored=self.other_stored,
            other_trained=self.lora() if self.other else 0.0,
            resident=(kept.other_weights + AWAY * kept.block_weights) * self.itemsize * share / GIB,
        )

    def encoders_gib(self, chosen: MemoryPlan) -> float:
        """What the text encoders take of the GPU in the form that was chosen."""
        forms = dict(chosen.encoders)
        return sum(encoder.gib(forms.get(encoder.name, "none"), self.itemsize) for encoder in self.encoders)

    def vae_pass(self, maps: float, latents: int) -> tuple[float, float]:
        """GiB of a pass of the VAE's encoder or decoder over so many latents, whole and in tiles."""
        pixels = latents * self.found.vae_scale**2
        map_gib = 4 * vae_width(self.found) / GIB
        return maps * map_gib * pixels, maps * map_gib * min(pixels, TILE**2)

    def choose(self, memory: str | None = None) -> MemoryPlan:
        """For the preset on this machine, or for a GPU of a named size with every means at hand."""
        model = self.preset.model
        installed = installed_backends() if self.free is not None else frozenset[str]()
        return choose_memory(
            self.needs(),
            free_gib=None if memory else self.free,
            memory=memory or model.memory,
            quantize=model.quantize,
            quantize_text_encoders=model.quantize_text_encoders,
            gradient_checkpointing=self.preset.train.gradient_checkpointing,
            backends=EVERY_BACKEND if memory else installed,
        )

    def base(self, quantize: str) -> float:
        """GiB of the frozen base in that form."""
        return weights_gib(self.kept.num_parameters, self.itemsize, quantize, self.stored, self.kept.linear)

    def parts(self, chosen: MemoryPlan) -> tuple[tuple[str, float], ...]:
        """Name and GiB of everything that a step holds in the GPU."""
        base = self.base(chosen.quantize)
        weights = self.tables() + (min(base, self.needs().resident) if chosen.offload else base)
        as_stored = ", in 8 bits as its file has it" if self.stored and chosen.quantize == "none" else ""
        activations = self.activations(chosen.gradient_checkpointing)
        rows = [
            ("CUDA itself", CONTEXT_GIB),
            (f"frozen base{as_stored}", weights),
            ("VAE decoder, for samples", self.vae),
            ("base for samples", 0.0 if chosen.in_turn else self.other_base(chosen)),
            ("LoRA on it", self.needs().other_trained),
            ("text encoders", self.resident),
            ("LoRA weights and gradients", self.lora()),
            ("optimizer state", self.state()),
            ("activations", activations),
            ("workspace", activations * (SPARE - 1)),
        ]
        return tuple((name, gib) for name, gib in rows if gib)

    def other_base(self, chosen: MemoryPlan) -> float:
        """What the base for samples takes while it is on the device, in GiB; 0 where the trained one draws."""
        needs = self.needs()
        counts = (needs.other_parameters, self.itemsize, chosen.quantize, needs.other_stored, needs.other_linear)
        return min(weights_gib(*counts), needs.resident) if chosen.offload else weights_gib(*counts)

    def blocks_at_home(self, chosen: MemoryPlan) -> float:
        """GiB of frozen blocks that wait in the computer's memory for their turn."""
        if not chosen.offload:
            return 0.0
        needs = self.needs()
        whole = weights_gib(self.kept.num_parameters, self.itemsize, stored=self.stored)
        blocks = whole * (1 - self.kept.other_weights / self.kept.num_parameters)
        other = weights_gib(needs.other_parameters, self.itemsize, stored=self.other_stored)
        return max(0.0, blocks - chosen.spare_gib) + other

    def savings(self, chosen: MemoryPlan, least: float = 0.01) -> tuple[tuple[str, float], ...]:
        """What a switch would save, beginning with the one that saves most; those below `least` GiB are left out."""
        batch = self.preset.train.micro_batch_size
        activations = self.activations(chosen.gradient_checkpointing) * SPARE
        base = 0.0 if chosen.offload else self.base(chosen.quantize)
        rows = [(f"model.quantize: {kind}", base - self.base(kind)) for kind in ("nf4", "int8")]
        if not chosen.gradient_checkpointing:
            saved = self.activations(False) - self.activations(True)
            rows.append(("train.gradient_checkpointing: true", saved * SPARE))
        if batch > 1:
            rows.append(("train.micro_batch_size: 1", activations * (1 - 1 / batch)))
        rows.append(("a resolution three quarters as large", activations * (1 - 0.75**2)))
        if self.preset.start_from.continue_ is not None:
            pass  # its modules and ranks are what they are
        elif self.preset.network.type == "lora":
            rows.append(("half the rank", (self.lora() + self.state()) / 2))
        else:
            rows.append(("twice the factor", (self.lora() + self.state()) * 3 / 4))
        if self.preset.network.text_encoder:
            rows.append(("network.text_encoder: false", self.resident))
        useful = [(name, gib) for name, gib in rows if gib >= least]
        return tuple(sorted(useful, key=lambda row: -row[1]))


def disk_parts(preset: Preset, memory: Memory, encoded: tuple[float, float]) -> tuple[tuple[str, float], ...]:
    """GiB of the cache (latents and captions), of checkpoints and of LoRA files."""
    kept = preset.save.keep_last + 1
    wide = {"fp32": 4}.get(preset.save.dtype, 2)
    return (
        ("cached latents, at most", encoded[0]),
        ("cached captions", encoded[1]),
        (f"checkpoints, {kept} of them", kept * memory.checkpoint()),
        ("LoRA files", 2 * memory.trained * wide / GIB),
    )
