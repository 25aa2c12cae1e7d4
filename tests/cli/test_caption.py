"""`emotrain caption`: a diff first, `--write` and `--undo`, and proposals by a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from emotrain.cli.app import main

CAPTIONS = {
    "a": "smile, watermark, red hair",
    "b": "red hair, 1girl",
    "sub/c é": "A woman.\nShe has red hair.",
    "d": None,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics" / "sub").mkdir(parents=True)
    for name, text in CAPTIONS.items():
        Image.new("RGB", (64, 64), (len(name) * 40 % 255, 90, 10)).save(tmp_path / "pics" / f"{name}.png")
        if text is not None:
            (tmp_path / "pics" / f"{name}.txt").write_bytes(text.encode())
    return Path("pics")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_diff_is_shown_and_nothing_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(folder)
    assert main(["caption", "pics", "--remove", "watermark", "--replace", "red hair=auburn hair"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "a.txt", "  - smile, watermark, red hair", "  + smile, auburn hair",
        "b.txt", "  - red hair, 1girl", "  + auburn hair, 1girl",
        "sub/c é.txt", "  - She has red hair.", "  + She has auburn hair.",
    ]  # fmt: skip
    assert "3 captions would change; nothing is written without --write" in said.err
    assert files(folder) == before


def test_write_and_undo(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(folder)
    assert main(["caption", "pics", "--trigger", "mika", "--add", "solo", "--move", "red hair=-1", "--write"]) == 0
    assert (folder / "a.txt").read_text() == "mika, smile, watermark, solo, red hair"
    assert (folder / "sub" / "c é.txt").read_text() == "mika, A woman.\nShe has red hair. solo"
    assert not (folder / "d.txt").exists()
    assert "emotrain caption pics --undo" in capsys.readouterr().err
    assert main(["lint", "pics"]) == 0  # the journal is no file of the data set
    assert main(["caption", "pics", "--undo"]) == 0
    assert files(folder) == before
    assert main(["caption", "pics", "--undo"]) == 5


def test_tags_are_counted_without_an_edit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", "pics"]) == 0
    said = capsys.readouterr()
    assert any(line.split() == ["red", "hair", "2", "67%"] for line in said.out.splitlines())
    assert "3 of 4 pictures have a caption" in said.err


def test_a_link_and_a_read_only_file_are_left_alone_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "b.txt").unlink()
    (folder / "b.txt").symlink_to("a.txt")
    (folder / "sub" / "c é.txt").chmod(0o444)
    assert main(["caption", "pics", "--add", "solo", "--write"]) == 0
    said = capsys.readouterr().err
    assert "b.txt is a link" in said
    assert "is read-only" in said
    assert "1 caption changed" in said
    assert (folder / "a.txt").read_text() == "smile, watermark, red hair, solo"
    assert (folder / "sub" / "c é.txt").read_bytes() == CAPTIONS["sub/c é"].encode()  # type: ignore[union-attr]


def test_captions_in_data_files_are_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "d.png", "text": "a listed one"}\n')
    assert main(["caption", "pics", "--add", "solo", "--write"]) == 0
    assert "d.png has its caption in a data file" in capsys.readouterr().err
    assert not (folder / "d.txt").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["nowhere"], 3),
        (["pics", "--write"], 2),
        (["pics", "--move", "smile"], 2),
        (["pics", "--move", "smile=0"], 2),
        (["pics", "--replace", "=x"], 2),
        (["pics", "--remove", " "], 2),
        (["pics", "--undo", "--add", "x"], 2),
        (["pics", "--propose", "nowhere"], 4),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(folder: Path, words: list[str], code: int) -> None:
    before = files(folder)
    assert main(["caption", *words]) == code
    assert files(folder) == before


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioning model and a tagger, tiny and random."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        PreTrainedTokenizerFast,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
    )

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"word{index}" for index in range(28))]
    plain = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={**sizes, "vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2,
                     "pad_token_id": 0, "encoder_hidden_size": 16},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
    )  # fmt: skip
    BlipForConditionalGeneration(config).save_pretrained(root / "blip")
    tokenizer.save_pretrained(root / "blip")
    vit = ViTForImageClassification(
        ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=3, problem_type="multi_label_classification",
                  id2label={0: "never", 1: "smile", 2: "long  hair"})
    )  # fmt: skip
    with torch.no_grad():
        vit.classifier.weight.zero_()
        vit.classifier.bias.copy_(torch.tensor([-5.0, 1.0, 3.0]))
    vit.save_pretrained(root / "tagger")
    for name in ("blip", "tagger"):
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / name)
    return root


def test_a_captioning_model_proposes_where_there_is_no_caption(
    folder: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(folder)
    assert main(["caption", "pics", "--propose", str(models / "blip"), "--trigger", "mika"]) == 0
    out = capsys.readouterr().out.splitlines()
    at = out.index("d.txt")
    assert out[at + 1].startswith("  + mika, word")
    assert files(folder) == before
    assert main(["caption", "pics", "--propose", str(models / "blip"), "--write"]) == 0
    assert (folder / "d.txt").read_text().startswith("word")
    assert main(["caption", "pics", "--propose", str(models / "blip")]) == 0
    assert "all pictures have a caption" in capsys.readouterr().err
    assert main(["caption", "pics", "--undo"]) == 0
    assert files(folder) == before


def test_a_tagger_proposes_its_likely_tags_the_likeliest_first(folder: Path, models: Path) -> None:
    assert main(["caption", "pics", "--propose", str(models / "tagger"), "--again", "--write"]) == 0
    assert (folder / "d.txt").read_text() == "long hair, smile\n"
    assert (folder / "a.txt").read_text() == "long hair, smile\n"


def test_a_model_of_another_kind_is_refused(folder: Path, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "blip", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert main(["caption", "pics", "--propose", str(tmp_path / "other")]) == 4
    (models / "blip" / "model.safetensors").rename(tmp_path / "gone")
    assert main(["caption", "pics", "--propose", str(models / "blip")]) == 4
    (tmp_path / "gone").rename(models / "blip" / "model.safetensors")
