"""Small random models of the newer families, whole as diffusers folders, and as ComfyUI's separate files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_tokenizer() -> Any:
    """A byte tokenizer with Qwen's special tokens and its chat template."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "pad_token": "<|endoftext|>"}
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "[SYSTEM_PROMPT]{{ m['content'][0]['text'] }}[/SYSTEM_PROMPT]{% else %}[INST]{{ m['content'][0]['text'] }}[/INST]"
    "{% endif %}{% endfor %}"
)


def mistral_tokenizer() -> Any:
    """A byte tokenizer with Mistral's special tokens and its chat template.

    It stands for the processor that FLUX.2 dev has, which is this and a reader of pictures that asks for torchvision.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
    )  # fmt: skip
    special = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


def mistral(width: int) -> Any:
    """A random Mistral 3 with its head and a small eye."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(16)
    text = {
        "model_type": "mistral", "vocab_size": 300, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4,
    }  # fmt: skip
    eye = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=eye)).eval()


def t5(width: int) -> tuple[Any, Any]:
    """A random T5 encoder, and a tokenizer of a few pieces of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    inner = Tokenizer(models.Unigram(pieces + [(chr(97 + i), -3.0) for i in range(26)], unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = T5TokenizerFast(tokenizer_object=inner, extra_ids=0)
    torch.manual_seed(17)
    config = T5Config(
        vocab_size=64, d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval(), tokenizer


def qwen(width: int, layers: int = 4, **words: Any) -> Any:
    """A random Qwen3 without its head."""
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(11)
    small = {
        "vocab_size": 300, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4,
    }  # fmt: skip
    return Qwen3Model(Qwen3Config(**{**small, **words})).eval()


def with_head(model: Any) -> Any:
    """A Qwen3 as FLUX.2 klein keeps it."""
    from transformers import Qwen3ForCausalLM

    whole = Qwen3ForCausalLM(model.config)
    whole.model.load_state_dict(model.state_dict())
    return whole.eval()


def qwen_vl(width: int, layers: int = 4) -> Any:
    """A random Qwen3-VL: a language model and a small eye that nothing looks through."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    torch.manual_seed(14)
    text = {
        "vocab_size": 300, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4, "pad_token_id": None,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    eye = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
        "deepstack_visual_indexes": [], "num_position_embeddings": 16,
    }  # fmt: skip
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=eye)).eval()


def qwen2_vl(width: int) -> Any:
    """A random Qwen2.5-VL with its head and a small eye."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(15)
    text = {
        "vocab_size": 300, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=eye)).eval()


def vae_of(kind: str) -> Any:
    """A random VAE of 8 pixels per latent."""
    import diffusers

    torch.manual_seed(12)
    if kind in ("krea2", "anima", "qwen"):
        return diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0],
        ).eval()  # fmt: skip
    blocks = 4
    words: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 64,
    }  # fmt: skip
    if kind == "qwen21":
        return diffusers.AutoencoderKLQwenImage21(
            base_dim=8, decoder_base_dim=8, z_dim=8, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.1 * i for i in range(8)], latents_std=[1.0 + 0.2 * i for i in range(8)],
        ).eval()  # fmt: skip
    if kind in ("flux2", "flux2-dev", "flux3"):
        vae = diffusers.AutoencoderKLFlux2(latent_channels=4, **words)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        return vae.eval()
    return diffusers.AutoencoderKL(
        latent_channels=4, scaling_factor=0.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
        **words,
    ).eval()  # fmt: skip


def denoiser_of(kind: str) -> Any:
    """A random denoiser; its zero-initialised parts are random too, or nothing would depend on anything."""
    import diffusers

    torch.manual_seed(13)
    if kind in ("flux2", "flux2-dev"):
        model = diffusers.Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=4, joint_attention_dim=96, timestep_guidance_channels=32, mlp_ratio=3.0,
            axes_dims_rope=(4, 4, 4, 4), rope_theta=2000, guidance_embeds=kind == "flux2-dev",
        )  # fmt: skip
    elif kind == "qwen21":
        model = diffusers.QwenImage21Transformer2DModel(
            in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=4,
            context_in_dim=32, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    elif kind == "flux3":
        model = diffusers.Flux3Transformer2DModel(
            in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=4, joint_attention_dim=256, timestep_channels=32, axes_dims_rope=(4, 4, 4, 4),
        )  # fmt: skip
    elif kind == "chroma":
        model = diffusers.ChromaTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=16,
            approximator_hidden_dim=32, approximator_layers=2,
        )  # fmt: skip
    elif kind == "anima":
        model = diffusers.CosmosTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=2,
            text_embed_dim=32, adaln_lora_dim=16, max_size=(4, 64, 64), patch_size=(1, 2, 2),
            rope_scale=(1.0, 4.0, 4.0), concat_padding_mask=True, extra_pos_embed_type=None,
        )  # fmt: skip
    elif kind == "qwen":
        model = diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    elif kind == "krea2":
        model = diffusers.Krea2Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=96, timestep_embed_dim=32, text_hidden_dim=32, num_text_layers=3,
            text_num_attention_heads=4, text_num_key_value_heads=4, text_intermediate_size=48,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    else:
        model = diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=32,
            axes_dims=[8, 4, 4], axes_lens=[1024, 64, 64],
        )  # fmt: skip
    for parameter in model.parameters():
        if float(parameter.detach().abs().max()) == 0.0:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def pipeline_of(kind: str) -> Any:
    """The stock pipeline of a family around the small parts."""
    from diffusers import (
        ChromaPipeline,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Pipeline,
        Krea2Pipeline,
        ZImagePipeline,
    )

    if kind == "chroma":

        class Masked(ChromaPipeline):
            """With a mask that hides: diffusers makes it numbers, 1 and 0, and adds them to the scores."""

            def _prepare_attention_mask(self, **words: Any) -> Any:
                mask = super()._prepare_attention_mask(**words)
                return None if mask is None else mask.bool()

        Masked.__name__ = "ChromaPipeline"
        encoder, tokenizer = t5(32)
        return Masked(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae_of(kind), text_encoder=encoder,
            tokenizer=tokenizer, transformer=denoiser_of(kind),
        )  # fmt: skip
    if kind == "qwen":
        from diffusers import QwenImagePipeline

        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
            shift_terminal=0.02,
        )  # fmt: skip
        return QwenImagePipeline(
            scheduler=scheduler, vae=vae_of(kind), text_encoder=qwen2_vl(32), tokenizer=qwen_tokenizer(),
            transformer=denoiser_of(kind),
        )  # fmt: skip
    if kind == "krea2":
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
        )
        return Krea2Pipeline(
            scheduler=scheduler, vae=vae_of(kind), text_encoder=qwen_vl(32), tokenizer=qwen_tokenizer(),
            transformer=denoiser_of(kind), text_encoder_select_layers=(1, 2, 3),
        )  # fmt: skip
    if kind in ("flux2", "flux2-dev"):
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
        )
        if kind == "flux2-dev":
            return Flux2Pipeline(
                scheduler=scheduler, vae=vae_of(kind), text_encoder=mistral(32), tokenizer=mistral_tokenizer(),
                transformer=denoiser_of(kind),
            )  # fmt: skip
        return Flux2KleinPipeline(
            scheduler=scheduler, vae=vae_of(kind), text_encoder=with_head(qwen(32)), tokenizer=qwen_tokenizer(),
            transformer=denoiser_of(kind),
        )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae_of(kind), text_encoder=qwen(32),
        tokenizer=qwen_tokenizer(), transformer=denoiser_of(kind),
    )  # fmt: skip


def modular_pipeline_of(kind: str) -> Any:
    """The stock modular pipeline of a family that has no other, around the small parts.

    The processor of texts and pictures asks for torchvision; its tokenizer stands for it.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.modular_pipelines.anima.modular_blocks_anima import AnimaAutoBlocks
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3AutoBlocks
    from diffusers.modular_pipelines.qwenimage21.modular_blocks_qwenimage21 import QwenImage21AutoBlocks
    from transformers import Qwen3VLForConditionalGeneration

    if kind == "anima":
        pipeline = AnimaAutoBlocks().init_pipeline()
        pipeline.update_components(**anima_parts(t5(32)[1]))
        return pipeline
    base = qwen_vl(32, layers=8)
    encoder = Qwen3VLForConditionalGeneration(base.config)
    encoder.model.load_state_dict(base.state_dict())
    parts = {"transformer": denoiser_of(kind), "vae": vae_of(kind), "text_encoder": encoder.eval()}
    if kind == "flux3":
        pipeline = Flux3AutoBlocks().init_pipeline()
        pipeline.update_components(**parts)
        return pipeline
    pipeline = QwenImage21AutoBlocks().init_pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
        shift_terminal=0.02,
    )  # fmt: skip
    pipeline.update_components(**parts, scheduler=scheduler)
    return pipeline


def save_folder(kind: str, pipeline: Any, folder: Path) -> Path:
    """The pipeline as a folder of diffusers, with the tokenizer where the public one has it."""
    if kind not in ("qwen21", "flux3"):
        pipeline.save_pretrained(str(folder))
        if kind == "flux2-dev":  # the public folder's tokenizer reads pictures too
            index = json.loads((folder / "model_index.json").read_text())
            index["tokenizer"] = ["transformers", "PixtralProcessor"]
            (folder / "model_index.json").write_text(json.dumps(index))
        return folder
    tokenizer = "processor" if kind == "qwen21" else "tokenizer"
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    qwen_tokenizer().save_pretrained(folder / tokenizer)
    index = json.loads((folder / "modular_model_index.json").read_text())
    index[tokenizer] = ["transformers", "Qwen3VLProcessor", {}]
    (folder / "modular_model_index.json").write_text(json.dumps(index))
    return folder


def original_denoiser(kind: str, model: Any) -> dict[str, torch.Tensor]:
    """The denoiser's tensors under the names that ComfyUI's files have."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    out: dict[str, torch.Tensor] = {}
    if kind == "zimage":
        for key, value in state.items():
            new = key.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
            new = new.replace("attention.to_out.0", "attention.out")
            new = new.replace("attention.norm_q", "attention.q_norm").replace("attention.norm_k", "attention.k_norm")
            if ".to_q." in new:
                qkv = [state[key.replace(".to_q.", f".to_{letter}.")] for letter in "qkv"]
                out[new.replace(".to_q.", ".qkv.")] = torch.cat(qkv)
            elif ".to_k." not in new and ".to_v." not in new:
                out[new] = value
        return out
    if kind == "krea2":
        return krea2_names(state)
    if kind == "qwen":
        return state
    if kind == "anima":
        return anima_names(state)
    from emotrain.families.chroma import spec as chroma
    from emotrain.families.flux2 import spec as flux2

    names = (chroma if kind == "chroma" else flux2).NAMES
    norms = {"attn.norm_q": "query_norm", "attn.norm_k": "key_norm"}
    added = {"attn.norm_added_q": "query_norm", "attn.norm_added_k": "key_norm"}
    done: set[str] = set()
    for key in state:
        path, _, last = key.rpartition(".")
        if path in done:
            continue
        if ".norms." in path:
            out[f"{path}.scale"] = state[key]
            continue
        found = next((side for side in (*norms, *added) if path.endswith(side)), None)
        if found is not None:
            number = path.split(".")[1]
            if path.startswith("single_"):
                out[f"single_blocks.{number}.norm.{norms[found]}.scale"] = state[key]
            else:
                stream = "img" if found in norms else "txt"
                out[f"double_blocks.{number}.{stream}_attn.norm.{(norms | added)[found]}.scale"] = state[key]
            continue
        group = names.to_original(path)
        assert group is not None, path
        value = torch.cat([state[f"{part}.{last}"] for part in group.parts])
        if group.swaps:
            scale, shift = value.chunk(2)
            value = torch.cat([shift, scale])
        out[f"{group.name}.{last}"] = value
        done.update(group.parts)
    return out


def anima_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Anima's own names, with the prefix that its file has."""
    from emotrain.families.anima.spec import NAMES

    norms = {"attn1.norm_q": "self_attn.q_norm", "attn1.norm_k": "self_attn.k_norm"}
    norms |= {"attn2.norm_q": "cross_attn.q_norm", "attn2.norm_k": "cross_attn.k_norm"}
    out = {}
    for key, value in state.items():
        path, _, last = key.rpartition(".")
        group = NAMES.to_original(path)
        if group is not None:
            out[f"net.{group.name}.{last}"] = value
        elif path == "time_embed.norm":
            out[f"net.t_embedding_norm.{last}"] = value
        else:
            name = next(theirs for ours, theirs in norms.items() if path.endswith(ours))
            out[f"net.blocks.{path.split('.')[1]}.{name}.{last}"] = value
    return out


def krea2_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Krea 2's own names."""
    heads = {
        "img_in.": "first.", "time_embed.linear_1.": "tmlp.0.", "time_embed.linear_2.": "tmlp.2.",
        "time_mod_proj.": "tproj.1.", "txt_in.norm.weight": "txtmlp.0.scale", "txt_in.linear_1.": "txtmlp.1.",
        "txt_in.linear_2.": "txtmlp.3.", "text_fusion.": "txtfusion.", "transformer_blocks.": "blocks.",
        "final_layer.linear.": "last.linear.", "final_layer.norm.weight": "last.norm.scale",
        "final_layer.scale_shift_table": "last.modulation.lin",
    }  # fmt: skip
    inner = {
        ".attn.to_q.": ".attn.wq.", ".attn.to_k.": ".attn.wk.", ".attn.to_v.": ".attn.wv.",
        ".attn.to_out.0.": ".attn.wo.", ".attn.to_gate.": ".attn.gate.", ".ff.": ".mlp.",
        ".attn.norm_q.weight": ".attn.qknorm.qnorm.scale", ".attn.norm_k.weight": ".attn.qknorm.knorm.scale",
        ".norm1.weight": ".prenorm.scale", ".norm2.weight": ".postnorm.scale", ".scale_shift_table": ".mod.lin",
    }  # fmt: skip
    out = {}
    for key, value in state.items():
        head = next((old for old in heads if key.startswith(old)), None)
        new = key if head is None else heads[head] + key[len(head) :]
        if new not in heads.values():
            for old, theirs in inner.items():
                new = new.replace(old, theirs)
        out[new] = value.reshape(-1) if new.endswith(".mod.lin") and new.startswith("blocks.") else value
    return out


def text_model(pipeline: Any) -> Any:
    """The language model of a pipeline's text encoder, without head and eyes."""
    encoder = getattr(pipeline.text_encoder, "model", pipeline.text_encoder)
    return getattr(encoder, "language_model", encoder)


def separate_files(kind: str, pipeline: Any, folder: Path) -> dict[str, Path]:
    """The model as ComfyUI's files: `denoiser`, `vae`, `text_encoder`, and a folder `tokenizer`.

    The configs of these sizes lie in the folder beside the denoiser, and beside the other two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.safetensors" for name in ("denoiser", "vae", "text_encoder")}
    save_file(original_denoiser(kind, pipeline.transformer), files["denoiser"])
    save_file({key: value.contiguous() for key, value in pipeline.vae.state_dict().items()}, files["vae"])
    model = text_model(pipeline)
    save_file({f"model.{key}": value.clone() for key, value in model.state_dict().items()}, files["text_encoder"])
    beside = folder / "denoiser" / "transformer"
    pipeline.transformer.save_config(beside)
    for part, module in (("vae", pipeline.vae), ("text_encoder", model)):
        config = dict(module.config) if part == "vae" else module.config.to_dict()
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config, default=str))
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    return {**files, "tokenizer": folder / "tokenizer"}


def in_one_file(files: dict[str, Path], texts: str = "text_encoders.qwen3_4b.", vae: str = "vae.") -> Path:
    """A checkpoint as ComfyUI saves it, with the configs of these sizes in the folder beside it.

    Args:
        files: of `separate_files`.
        texts: how ComfyUI lets the text encoder begin.
        vae: and the VAE.
    """
    path = files["denoiser"].with_name("all.safetensors")
    prefixed = {vae: files["vae"], f"{texts}transformer.": files["text_encoder"]}
    whole = {f"{prefix}{key}": value for prefix, file in prefixed.items() for key, value in load_file(file).items()}
    whole[f"{texts}logit_scale"] = torch.ones(())
    for key, value in load_file(files["denoiser"]).items():
        whole[f"model.diffusion_model.{key.removeprefix('model.diffusion_model.').removeprefix('net.')}"] = value
    save_file(whole, path)
    beside = path.with_suffix("")
    shutil.copytree(files["denoiser"].with_suffix(""), beside)
    for part in ("vae", "text_encoder"):
        shutil.copytree(files[part].with_suffix(""), beside / part)
    if "tokenizer" in files:
        shutil.copytree(files["tokenizer"], beside / "tokenizer")
    return path


def anima_parts(t5_tokenizer: Any) -> dict[str, Any]:
    """Anima's parts by the names of diffusers' modular pipeline; it reads captions by two tokenizers."""
    from diffusers import AnimaTextConditioner, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(21)
    conditioner = AnimaTextConditioner(
        source_dim=32, target_dim=32, model_dim=32, num_layers=2, num_attention_heads=4,
        target_vocab_size=len(t5_tokenizer) + 8,
    )  # fmt: skip
    return {
        "transformer": denoiser_of("anima"), "vae": vae_of("anima"), "text_encoder": qwen(32),
        "text_conditioner": conditioner.eval(), "tokenizer": qwen_tokenizer(), "t5_tokenizer": t5_tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip


def anima_files(parts: dict[str, Any], folder: Path) -> Path:
    """A folder with anima.safetensors, vae.safetensors, text_encoder.safetensors and configs of these sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    adapter = {f"net.llm_adapter.{k}": v.contiguous() for k, v in parts["text_conditioner"].state_dict().items()}
    save_file(
        {k: v.contiguous() for k, v in original_denoiser("anima", parts["transformer"]).items()} | adapter,
        folder / "anima.safetensors",
    )
    save_file({k: v.contiguous() for k, v in parts["vae"].state_dict().items()}, folder / "vae.safetensors")
    language = {f"model.{k}": v.contiguous() for k, v in parts["text_encoder"].state_dict().items()}
    save_file(language, folder / "text_encoder.safetensors")
    beside = folder / "anima"
    for name, config in (
        ("anima/transformer", dict(parts["transformer"].config)), ("vae", dict(parts["vae"].config)),
        ("anima/text_encoder_2", dict(parts["text_conditioner"].config)),
        ("text_encoder", parts["text_encoder"].config.to_dict()),
    ):  # fmt: skip
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config, default=str))
    parts["tokenizer"].save_pretrained(beside / "tokenizer")
    parts["t5_tokenizer"].save_pretrained(beside / "tokenizer_2")
    return folder
