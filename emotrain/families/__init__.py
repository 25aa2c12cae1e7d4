"""Model families: recognising, loading, encoding, predicting, sampling.

`load_family` is the way in; torch is imported by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emotrain.families.common import LoadedFamily
    from emotrain.families.kept import KeptBase
    from emotrain.families.memory import MemoryPlan


def load_family(
    base: str,
    *,
    family: str = "auto",
    vae: str | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    quantize: str = "none",
    quantize_text_encoders: str = "auto",
    plan: MemoryPlan | None = None,
    device: str = "auto",
    gradient_checkpointing: bool | str = "auto",
    prediction: str = "auto",
    clip_skip: int | str = "auto",
    kept: KeptBase | None = None,
) -> LoadedFamily:
    """Load a model, frozen, ready for a LoRA.

    Args:
        base: a .safetensors file, a diffusers folder, a hub id, or `builtin:tiny-sd` | `builtin:tiny-flux`.
        family: auto, or the family that it has to be.
        vae: another VAE: a diffusers folder, a hub id or a file.
        text_encoder: of a single file without one: a file or a folder.
        tokenizer: a folder with its tokenizer.
        revision: a hub id's branch, tag or commit.
        dtype: auto | bf16 | fp16 | fp32, of the denoiser and the text encoders; auto is bf16 on GPUs that have it,
            fp16 on others, fp32 on the CPU.
        quantize: none | int8 | nf4 | fp8, of the frozen denoiser.
        quantize_text_encoders: none | int8 | nf4 | fp8, of T5 and language models; auto is none.
        plan: what is done to fit into the GPU; without one what is named here.
        device: auto | cuda | mps | cpu.
        gradient_checkpointing: whether activations are computed again in the backward pass; auto is not.
        prediction: auto | epsilon | v | flow, where the files do not say it or say it wrongly.
        clip_skip: which layer of CLIP the prompt is taken from: 1 is the last; auto is the family's own.
        kept: what the run before in a queue has loaded, and what is kept for the next.

    Returns:
        The family; `placement` says in one sentence what was decided about memory.

    Raises:
        ConfigError: an unknown name.
        ModelError: the model is missing, not readable or not of that family.
        ResourceError: a device that is not there.
    """
    from emotrain.families.loading import load

    return load(
        base, family=family, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, revision=revision, dtype=dtype,
        quantize=quantize, quantize_text_encoders=quantize_text_encoders, plan=plan, device=device,
        gradient_checkpointing=gradient_checkpointing, prediction=prediction, clip_skip=clip_skip,
        kept=kept,
    )  # fmt: skip
