"""Anima (CircleStone 2026): Cosmos-Predict2's transformer, captions by Qwen3-0.6B and T5's words; facts (no torch)."""

from __future__ import annotations

from emotrain.families.spec import (
    T5_TOKENIZER,
    TEXTS_BEGIN,
    VAE_BEGINS,
    FamilySpec,
    FileFacts,
    LoraFacts,
    NameTable,
    TextEncoder,
    Variant,
    by_signs,
    same_sizes,
)

MAX_TOKENS = 512
ADAPTER = "llm_adapter."  # the text conditioner's tensors, in the denoiser's own file


_BLOCK, _NORMS = "transformer_blocks.{i}", {"self_attn": "norm1", "cross_attn": "norm2", "mlp": "norm3"}
_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}
NAMES = NameTable(
    rows=(
        *((f"blocks.{{i}}.self_attn.{name}", (f"{_BLOCK}.attn1.{own}",)) for name, own in _ATTENTION.items()),
        *((f"blocks.{{i}}.cross_attn.{name}", (f"{_BLOCK}.attn2.{own}",)) for name, own in _ATTENTION.items()),
        ("blocks.{i}.mlp.layer1", (f"{_BLOCK}.ff.net.0.proj",)),
        ("blocks.{i}.mlp.layer2", (f"{_BLOCK}.ff.net.2",)),
        *(
            (f"blocks.{{i}}.adaln_modulation_{part}.{n}", (f"{_BLOCK}.{norm}.linear_{n}",))
            for part, norm in _NORMS.items()
            for n in (1, 2)
        ),
        ("x_embedder.proj.1", ("patch_embed.proj",)),
        ("t_embedder.1.linear_1", ("time_embed.t_embedder.linear_1",)),
        ("t_embedder.1.linear_2", ("time_embed.t_embedder.linear_2",)),
        ("final_layer.adaln_modulation.1", ("norm_out.linear_1",)),
        ("final_layer.adaln_modulation.2", ("norm_out.linear_2",)),
        ("final_layer.linear", ("proj_out",)),
    ),
    heads=("x_embedder.proj.1", "t_embedder.1."),
)

ANIMA = FamilySpec(
    name="anima",
    title="Anima",
    pipeline="AnimaModularPipeline",
    denoiser_class="CosmosTransformer3DModel",
    model_class="Anima",
    guidance=4.0,
    text_encoders=(
        TextEncoder(
            "text_encoder", "llm", 596_049_920, ("Qwen/Qwen3-0.6B-Base", ""), "Qwen2Tokenizer",
            prefixes=TEXTS_BEGIN, max_tokens=MAX_TOKENS,
        ),
        TextEncoder(
            "text_encoder_2", "adapter", 134_663_680, (T5_TOKENIZER, ""), "T5TokenizerFast", prefixes=(ADAPTER,),
            max_tokens=MAX_TOKENS, adds_tokens=False, folders=("text_conditioner", "t5_tokenizer"),
        ),
    ),
    variants={
        "anima": Variant(
            1_956_405_248, {"attn": 224, "attn-mlp": 280, "all": 454}, "anima", "circlestone-labs/Anima"
        ),
    },
    lora=LoraFacts(
        targets={
            "attn": (r"transformer_blocks\.\d+\.attn[12]\.(?:to_[qkv]|to_out\.0)",),
            "mlp": (r"transformer_blocks\.\d+\.ff\.net\.(?:0\.proj|2)",),
            "rest": (
                r"transformer_blocks\.\d+\.norm[123]\.linear_[12]",
                r"patch_embed\.proj|time_embed\.t_embedder\.linear_[12]|norm_out\.linear_[12]|proj_out",
            ),
        },
        heads=("transformer_blocks.", "patch_embed.", "time_embed.", "norm_out.", "proj_out"),
        marks=(
            r"transformer_blocks\.\d+\.attn1\..*",
            r"blocks\.\d+\.(?:(?:self|cross)_attn\..*|mlp\.layer[12]|adaln_modulation_\w+\.[12])",
        ),
        originals=NAMES,
        layout="comfyui",
        loader="AnimaLoraLoaderMixin",
        unread_layouts=("kohya",),
        base_version="anima",
        stated=("anima",),
    ),
    file=FileFacts(
        by_signs("anima", "blocks.0.mlp.layer1.weight", f"{ADAPTER}blocks.0.cross_attn.q_proj.weight"),
        ("blocks.", "x_embedder.", "t_embedder.", "t_embedding_norm.", "final_layer.", "pos_embedder.", ADAPTER),
        VAE_BEGINS,
        check=same_sizes("Anima", "Anima Base", {"blocks": "num_layers"}, width="blocks.0.mlp.layer1.weight"),
    ),
    blocks=("CosmosTransformerBlock",),
    vae_class="AutoencoderKLQwenImage",
    patch=2,
    elsewhere={
        "kohya lora_anima": "anima", "kohya anima_checkbox": "anima", "kohya qwen3": "anima",
        "ai-toolkit anima": "anima", "onetrainer ANIMA": "anima", "diffusion-pipe anima": "anima",
    },
)  # fmt: skip
