"""Captions by vision-language models: tiny random ones of each kind, with chat templates in the forms in use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.generation import GenerationMixin

from emotrain.errors import ModelError
from emotrain.runs.captioner import ASK, load_captioner

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
          "patch_size": 14, "spatial_merge_size": 2}  # fmt: skip
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}USER: {% for c in m.content %}{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}"
    "{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
)
PLACED = "{% for m in messages %}[{{ m.role }}] <image>{{ m.content | trim }}\n{% endfor %}[assistant]"  # a text alone
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content + '' }}\n{% endfor %}[assistant]"  # nothing of pictures


def tokenizer(*special: str, **named: str) -> Any:
    """A byte a token; the first special one ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={letter: k for k, letter in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(list(special))
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token=special[0], pad_token=special[0], bos_token=special[0],
        additional_special_tokens=list(special[1:]), extra_special_tokens=named,
    )  # fmt: skip
    found.padding_side = "left"
    return found


def qwen(folder: Path, version: str) -> None:
    words = ("<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    own = tokenizer(*words)
    ids = {f"{word[2:-2].replace('pad', 'token_id')}": own.convert_tokens_to_ids(word) for word in words[4:]}
    ids |= {f"{word[2:-2]}_token_id": own.convert_tokens_to_ids(word) for word in words[2:4]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**SIZES, "vocab_size": len(own), "rope_parameters": rope, "head_dim": 8}
    more = {"window_size": 56, "fullatt_block_indexes": [0]}
    if version == "3":
        more = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    kind = {"2.5": "Qwen2_5_VL", "3": "Qwen3VL"}[version]
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config={**VISION, **more}, **ids)
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(folder)
    own.save_pretrained(folder)
    transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 16).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(QWEN)


def llava(folder: Path, template: str) -> None:
    own = tokenizer("</s>", "<image>")
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = transformers.LlamaConfig(**SIZES, vocab_size=len(own), bos_token_id=0, eos_token_id=256)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=own.convert_tokens_to_ids("<image>")
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28), tokenizer=own,
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip


def florence(folder: Path) -> None:
    own = tokenizer("</s>", "<image>", image_token="<image>")
    stage = {"embed_dim": (8,), "num_heads": (2,), "num_groups": (2,), "depths": (1,), "patch_size": (7,),
             "patch_stride": (4,), "patch_padding": (3,), "patch_prenorm": (False,), "projection_dim": 16,
             "window_size": 4}  # fmt: skip
    text = transformers.BartConfig(
        vocab_size=len(own), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=256, bos_token_id=256,
        eos_token_id=256, decoder_start_token_id=256, forced_eos_token_id=None,
    )  # fmt: skip
    config = transformers.Florence2Config(
        text_config=text.to_dict(), vision_config=stage, image_token_id=own.convert_tokens_to_ids("<image>")
    )
    transformers.Florence2ForConditionalGeneration(config).save_pretrained(folder)
    pixels = transformers.CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    pixels.image_seq_length = 65
    transformers.Florence2Processor(image_processor=pixels, tokenizer=own, post_processor_config={}).save_pretrained(
        folder
    )


MAKERS: dict[str, Callable[[Path], None]] = {
    "qwen2.5": lambda folder: qwen(folder, "2.5"),
    "qwen3": lambda folder: qwen(folder, "3"),
    "llava": lambda folder: llava(folder, PARTS),
    "joycaption": lambda folder: llava(folder, PLACED),
    "llava-plain": lambda folder: llava(folder, PLAIN),
    "florence2": florence,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def of(name: str) -> Path:
        if not (root / name).exists():
            torch.manual_seed(0)
            MAKERS[name](root / name)
        return root / name

    return of


class Generate:
    """Runs the model for two tokens, keeps what it was given, and answers what the test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
        self.given: dict[str, Any] = {}
        real = GenerationMixin.generate

        def generate(model: Any, **given: Any) -> torch.Tensor:
            self.given = given
            assert given["do_sample"] is False
            real(model, **{**given, "max_new_tokens": 2})
            words = self.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
            ids = given["input_ids"]
            return words if model.config.is_encoder_decoder else torch.cat([ids, words], dim=1)

        monkeypatch.setattr(GenerationMixin, "generate", generate)
        self.tokenizer: Any = None


PICTURE = Image.new("RGB", (60, 40), (200, 30, 30))


@pytest.mark.parametrize("ask", ["", "Which colour is it?"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_model_is_asked_about_the_picture_and_answers(
    name: str, ask: str, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders(name)
    watch = Generate(monkeypatch, "<think>Hm.</think>\n a red \n\nlamp ")
    watch.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    describe = load_captioner(folder, ask)
    assert describe(PICTURE) == "a red lamp"
    token = "<|image_pad|>" if name.startswith("qwen") else "<image>"
    ids = watch.given["input_ids"][0]
    places = int((ids == watch.tokenizer.convert_tokens_to_ids(token)).sum())
    assert places == {"q": 2, "l": 4, "j": 4, "f": 65}[name[0]]
    said = watch.tokenizer.decode(ids, skip_special_tokens=True)
    wanted = ask or ("Describe in detail what is shown in the image." if name == "florence2" else ASK)
    assert wanted in said
    assert said.count(wanted) == 1
    first = watch.given["pixel_values"].clone()
    describe(Image.new("RGB", (60, 40)))
    assert not torch.equal(first, watch.given["pixel_values"])


def test_a_large_picture_is_made_smaller_first(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders("llava")
    seen: list[tuple[int, int]] = []
    real = transformers.LlavaProcessor.__call__

    def call(self: Any, images: Any = None, text: Any = None, **more: Any) -> Any:
        seen.append(images[0].size)
        return real(self, images=images, text=text, **more)

    monkeypatch.setattr(transformers.LlavaProcessor, "__call__", call)
    picture = Image.new("RGB", (3000, 2000))
    load_captioner(folder)(picture)
    assert seen == [(1024, 683)]
    assert picture.size == (3000, 2000)


def test_what_takes_no_question_or_no_picture_says_so(folders: Callable[[str], Path], tmp_path: Path) -> None:
    plain = tmp_path / "no-template"
    llava(plain, PARTS)
    for path in plain.glob("chat_template*"):
        path.unlink()
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has no chat template"):
        load_captioner(plain)
    blind = tmp_path / "blind"
    llava(blind, "{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(ModelError, match="takes no picture"):
        load_captioner(blind)


def test_weights_of_another_form_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers would go on with random weights in their place."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    llava(other, PARTS)
    path = other / "model.safetensors"
    tensors = {f"image_{key}" if "vision" in key else key: value for key, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match="is without .* weights that a LlavaForConditionalGeneration has"):
        load_captioner(other)
