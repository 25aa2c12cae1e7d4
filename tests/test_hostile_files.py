"""Files that were meddled with: each is refused in a line, or read as well as it can be, and harms nothing else."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import hostile
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from emotrain.cli.app import main
from emotrain.config.load import load_preset
from emotrain.config.source import resolve_scalar
from emotrain.dataset.captions import fill_trigger
from emotrain.dataset.images import decode_picture, read_header
from emotrain.dataset.lint_tokens import tokenizer_in
from emotrain.dataset.textfile import FileProblem
from emotrain.errors import CheckpointError, ConfigError
from emotrain.files import read_regular, strict_json
from emotrain.runs.folder import RunFolder, create_run
from emotrain.runs.lock import is_held

ASSETS = Path(__file__).parents[1] / "emotrain" / "assets"


def said(words: list[str], capsys: Any) -> tuple[int, str]:
    code = main(words)
    streams = capsys.readouterr()
    return code, streams.out + streams.err


# ------------------------------------------------------------ presets


def test_the_number_of_a_list_item_is_written_in_plain_digits(capsys: Any) -> None:
    for part in ("²", "٣", "9" * 5000):
        code, text = said(["check", "quickstart", "--set", f"dataset.folders.{part}.repeats=2"], capsys)
        assert code == 2
        assert "dataset.folders" in text
    assert said(["check", "quickstart", "--set", "dataset.folders.0.repeats=2"], capsys)[0] == 0


def test_a_number_of_5000_digits_is_no_number(capsys: Any) -> None:
    assert resolve_scalar("1" * 40) == int("1" * 40)
    assert resolve_scalar("1" * 5000) == "1" * 5000
    code, text = said(["check", "quickstart", "--set", f"network.rank={'1' * 5000}"], capsys)
    assert (code, "network.rank is" in text) == (2, True)


# ------------------------------------------------------------ configs


def test_json_numbers_are_finite_and_those_of_real_tokenizers_are_read() -> None:
    for text in ("1e999", "-1e999", "NaN", "Infinity", "1" * 41):
        with pytest.raises(ValueError, match="number|digits"):
            strict_json(text)
    assert strict_json('{"model_max_length": 1000000000000000019884624838656}')["model_max_length"] > 1e29


@pytest.fixture
def model(tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(ASSETS / "tiny-sd", tmp_path / "m")
    text = f"model: {tmp_path / 'm'}\ndataset: {{folders: [{{path: builtin:example}}], resolution: 64}}\n"
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def spoil(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def test_a_tokenizer_that_says_no_length_leaves_the_family_s(model: Path) -> None:
    from emotrain.families.table import sniff
    from emotrain.families.texts import num_text_tokens

    for value, tokens in (("((", 77), (None, 77), ([], 77), (-5, 77), (16, 16), (10**30, 77)):
        spoil(model / "m" / "tokenizer" / "tokenizer_config.json", model_max_length=value)
        assert num_text_tokens(sniff(str(model / "m"))) == tokens


@pytest.mark.parametrize("field", [{"block_out_channels": ["a", "b"]}, {"cross_attention_dim": "x"}])
def test_a_denoiser_that_cannot_be_built_is_the_model_s_fault_in_plan(
    field: dict[str, Any], model: Path, capsys: Any
) -> None:
    spoil(model / "m" / "unet" / "config.json", **field)
    code, text = said(["plan", str(model / "p.yaml")], capsys)
    assert code == 4, text
    assert "unet" in text


def test_a_text_encoder_whose_config_is_of_other_types_is_the_model_s_fault(model: Path, capsys: Any) -> None:
    spoil(model / "m" / "text_encoder" / "config.json", hidden_size="1_000")
    words = ["run", str(model / "p.yaml"), "--runs-dir", str(model / "runs"), "--plain"]
    code, text = said(words, capsys)
    assert code == 4, text
    assert "text_encoder/config.json` says hidden_size is '1_000', which no model has" in text


@pytest.mark.parametrize(("part", "value"), [("unet", "nan"), ("text_encoder", "inf"), ("vae", "-inf")])
def test_a_model_with_a_number_that_is_not_finite_is_named(model: Path, part: str, value: str, capsys: Any) -> None:
    """Of the VAE this was a decoder that drew black, with exit 0."""
    file = next((model / "m" / part).glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(key for key in weights if key.endswith("weight"))[-1]
    weights[name].view(-1)[3] = float(value)
    save_file(weights, file)
    code, text = said(["run", str(model / "p.yaml"), "--runs-dir", str(model / "runs"), "--plain"], capsys)
    assert code == 4, text
    assert f"the {'denoiser' if part == 'unet' else part} of " in text
    assert f"a number that is not finite in `{name}`" in text


def test_a_tokenizer_nested_too_deeply_leaves_the_estimate(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model":' * 100_000, encoding="utf-8")
    assert tokenizer_in(tmp_path) is None


def test_a_word_of_60_000_letters_is_counted_at_once(capsys: Any) -> None:
    counter = tokenizer_in(ASSETS / "tiny-sd" / "tokenizer")
    assert counter is not None
    start = time.process_time()
    assert counter.count("w" * 60_000) > 1000
    assert time.process_time() - start < 3
    assert counter.count("a rocket") == counter.count("a") + counter.count("rocket")


# ------------------------------------------------------------ captions and pictures


@pytest.mark.parametrize(
    ("prompt", "filled"),
    [
        ("[trigger], a cat", "a cat"),
        ("a [trigger] cat", "a cat"),
        ("a  [trigger] ,  cat", "a cat"),
        ("a [trigger][trigger], b", "a  b"),
        ("a, [trigger]", "a"),
        ("", ""),
    ],
)
def test_a_prompt_without_a_trigger_loses_the_word_and_its_comma(prompt: str, filled: str) -> None:
    assert fill_trigger(prompt, None) == filled


def test_60_000_spaces_in_a_caption_take_no_time() -> None:
    start = time.process_time()
    assert fill_trigger("a" + " " * 60_000 + "b", None).startswith("a  ")
    assert time.process_time() - start < 1


def of_many_pieces(format: str, count: int) -> bytes:
    """A picture of 64 pixels with so many empty chunks or comments before its first pixel."""
    stream = io.BytesIO()
    Image.new("P" if format == "GIF" else "RGB", (64, 64)).save(stream, format)
    data = stream.getvalue()
    if format == "GIF":
        begin = 13 + (3 * (2 << (data[10] & 7)) if data[10] & 0x80 else 0)
        return data[:begin] + b"\x21\xfe\x01a\0" * count + data[begin:]
    chunk = struct.pack(">I", 0) + b"aaAa" + struct.pack(">I", zlib.crc32(b"aaAa"))
    return data[:33] + chunk * count + data[33:]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_picture_gets_no_more_time_than_its_size_takes(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock counts a tenth of a second a look: the limit is the processor's time, which tests do not wait for."""
    clock = itertools.count()
    monkeypatch.setattr("emotrain.dataset.images.time.thread_time", lambda: next(clock) / 10)
    assert decode_picture(of_many_pieces(format, 0), path="a").image.size == (64, 64)
    for read in (read_header, decode_picture):
        with pytest.raises(FileProblem, match="takes far longer to read"):
            read(of_many_pieces(format, 100), path="a")


def test_a_jpeg_of_thousands_of_scans_is_refused_and_a_common_one_read() -> None:
    assert decode_picture(hostile.many_scans(12, 256), path="a.jpg").image.size == (256, 256)
    data = hostile.many_scans(400, 1200)
    start = time.process_time()
    with pytest.raises(FileProblem, match="passes, which take minutes"):
        read_header(data, path="a.jpg")
    assert time.process_time() - start < 1


def test_a_cut_animated_gif_is_damaged_at_every_length() -> None:
    buffer = io.BytesIO()
    first = Image.effect_noise((16, 16), 80)
    first.save(buffer, "GIF", save_all=True, append_images=[first.rotate(90), first.rotate(180)])
    data = buffer.getvalue()
    problems = 0
    for length in range(len(data)):
        try:
            decode_picture(data[:length], path="a.gif")
        except FileProblem:
            problems += 1
    assert problems > len(data) // 3


# ------------------------------------------------------------ run folders


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("good", "bad"):
        create_run(tmp_path / "runs", name, {"name": name})
    return tmp_path / "runs"


WRONG: dict[str, Any] = {
    "steps": "many", "best_loss": [1], "parents": 7, "stop_reason": {"a": 1}, "started": 5, "libraries": [],
    "best_step": True, "seed": 1.5, "held_out": "x",
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_a_run_described_with_other_types_is_damaged_and_the_others_are_listed(
    field: str, runs: Path, capsys: Any
) -> None:
    spoil(runs / "bad" / "run.json", **{field: WRONG[field]})
    with pytest.raises(CheckpointError, match=f"`{field}` is of another kind"):
        RunFolder(runs / "bad").info()
    code, text = said(["runs", "list", "--runs-dir", str(runs)], capsys)
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["good", "bad"]
    assert "damaged" in text
    assert said(["runs", "show", "good", "--runs-dir", str(runs)], capsys)[0] == 0
    assert said(["runs", "show", "bad", "--runs-dir", str(runs)], capsys)[0] == 5


def test_a_number_that_is_infinite_is_no_loss(runs: Path, capsys: Any) -> None:
    path = runs / "bad" / "run.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"best_loss": null', '"best_loss": 1e999'), encoding="utf-8"
    )
    code, text = said(["runs", "compare", "good", "bad", "--runs-dir", str(runs), "--json"], capsys)
    assert code == 0
    assert json.loads(text)["runs"][1]["status"] == "damaged"


LOCKS: dict[str, bytes] = {
    "a list": b"[1]", "a text for a process": b'{"pid": "x", "host": []}', "a huge process": b'{"pid": 1e300}',
    "deep": b"[" * 100_000, "no text": b"\xff\xfe\x00", "huge": b'{"pid": ' + b" " * 10_000 + b"1}",
    "a process number of 400 digits": b'{"pid": ' + b"9" * 400 + b"}",
}  # fmt: skip


@pytest.mark.parametrize("kind", LOCKS)
def test_a_lock_of_another_kind_holds_nothing(kind: str, runs: Path, capsys: Any) -> None:
    (runs / "bad" / ".lock").write_bytes(LOCKS[kind])
    assert not is_held(runs / "bad" / ".lock")
    code, text = said(["runs", "list", "--runs-dir", str(runs)], capsys)
    assert (code, "good" in text, "bad" in text) == (0, True, True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", [".lock", "preset.yaml", "picture_losses.jsonl", "lora.safetensors", "metrics.jsonl"])
def test_a_pipe_in_a_run_is_not_waited_for(name: str, runs: Path, capsys: Any) -> None:
    (runs / "bad" / name).unlink(missing_ok=True)
    os.mkfifo(runs / "bad" / name)
    with pytest.raises(OSError, match="not a regular file"):
        read_regular(runs / "bad" / name)
    for words in (["list"], ["show", "bad"], ["compare", "good", "bad"]):
        assert said(["runs", *words, "--runs-dir", str(runs)], capsys)[0] in (0, 2, 5)
    assert said(["images", "bad", "--runs-dir", str(runs)], capsys)[0] == 5


@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": 1e999, "samples": []}', '{"step": {}, "samples": 4}'])
def test_losses_of_another_kind_cannot_be_ranked(line: str, runs: Path, capsys: Any) -> None:
    (runs / "bad" / "picture_losses.jsonl").write_text(f'{line}\n{{"step": 2, "samples": []}}\n', encoding="utf-8")
    code, text = said(["images", "bad", "--runs-dir", str(runs)], capsys)
    assert (code, "line 1" in text) == (5, True)


def test_what_a_bug_raises_in_a_run_leaves_its_traceback_in_the_run_s_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from emotrain.runs import training

    def fail(*_: Any) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(training, "start_event", fail)
    words = ["run", "quickstart", "--runs-dir", str(tmp_path), "--plain", "--set", "train.max_steps=1"]
    words += ["--set", "network.targets=[mid_block.*to_q]", "--set", "train.loss.baseline=raw"]
    code, text = said(words, capsys)
    assert code == 1
    kept = list((tmp_path / "quickstart").glob("traceback-*.txt"))
    assert len(kept) == 1
    assert str(kept[0]) in text
    assert "a bug of ours" in kept[0].read_text(encoding="utf-8")


def test_losses_of_different_validations_never_stand_side_by_side(runs: Path, capsys: Any) -> None:
    for name, held in (("good", ["a.png"]), ("bad", ["a.png"])):
        RunFolder(runs / name).update_info(held_out=held, best_loss=0.123, base_loss=0.456, base_sha256="0")
    words = ["runs", "compare", "good", "bad", "--runs-dir", str(runs)]
    assert "0.123" in said(words, capsys)[1]
    RunFolder(runs / "bad").update_info(held_out=["b.png"])
    code, text = said(words, capsys)
    assert (code, "0.123" in text, "0.456" in text) == (0, False, False)
    assert "not validated alike (held_out)" in text
    assert json.loads(said([*words, "--json"], capsys)[1])["validated_apart"] == ["held_out"]
    RunFolder(runs / "bad").update_info(held_out=["a.png"])
    (runs / "bad" / "preset.yaml").write_text("name: bad\ntrain: {seed: 3}\n", encoding="utf-8")
    assert "not validated alike (train.seed)" in said(words, capsys)[1]


def test_other_library_versions_are_told_in_one_line() -> None:
    from emotrain.runs.changes import library_changes

    before = {"torch": "2.8.0", "peft": "0.17"}
    assert library_changes(before, before) is None
    line = library_changes(before, {"torch": "2.9.0", "peft": "0.17", "numpy": "2.0"})
    assert line is not None
    assert "(torch 2.8.0 -> 2.9.0)" in line


def test_a_foreign_or_huge_picture_in_samples_leaves_a_grey_cell(tmp_path: Path) -> None:
    import struct
    import zlib

    from emotrain.observers.sheet import make_sheet

    good, text, huge, broken = (tmp_path / f"{name}.png" for name in ("good", "text", "huge", "broken"))
    Image.new("RGB", (64, 64), (200, 10, 10)).save(good)
    text.write_text("not a picture", encoding="utf-8")
    data = good.read_bytes()
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    huge.write_bytes(data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:])
    broken.write_bytes(data[:33] + b"\xff" * 40)
    sheet = make_sheet({0: [huge, text], 5: [broken, good]}, ["a", "b"])
    assert (200, 10, 10) in {colour for _, colour in sheet.getcolors(1 << 20) or ()}


def test_the_curves_of_a_resumed_run_begin_at_its_first_step(tmp_path: Path) -> None:
    from emotrain.observers.board import Board
    from emotrain.train.events import RunStart

    row = {"observed_loss": 0.5, "scalar": 0.0, "trust": 0.1, "pulse": 1.0}
    lines = [json.dumps({"step": step, "loss": 1 / step, **row}) for step in range(1, 31)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 31, "lo']), encoding="utf-8")
    start = RunStart(
        name="x", run_dir=tmp_path, start_step=20, max_steps=40, steps_per_epoch=1.0, optimizer="emosens", num_images=1,
        num_modules=1, num_parameters=1, device="cpu",
    )  # fmt: skip
    board = Board(clock=lambda: 0.0)
    board.note(start)
    assert board.traces["loss"].num_values == board.traces["smoothed"].num_values == 20
    assert board.step == 20


# ------------------------------------------------------------ LoRA files


@pytest.mark.parametrize("out", ["/dev/null/x.safetensors", "file/x.safetensors", "nowhere/x.safetensors"])
def test_a_converted_file_that_cannot_be_written_is_said_in_a_line(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "a.safetensors").write_bytes(hostile.lora_files()["kohya"])
    for words in (["convert", "a.safetensors", "--to", "diffusers"], ["merge", "a.safetensors", "a.safetensors"]):
        code, text = said(["lora", *words, "-o", out], capsys)
        assert code in (4, 6), text
        assert text.startswith("error: ")


def test_a_read_only_place_is_exit_6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from emotrain.errors import ResourceError
    from emotrain.lora import container

    def refuse(self: Path, *_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ResourceError, match="Read-only file system") as caught:
        container.write(tmp_path / "x.safetensors", {}, {})
    assert caught.value.exit_code == 6


def test_embeddings_in_a_lora_file_are_left_out_with_a_warning(tmp_path: Path, capsys: Any) -> None:
    import torch
    from safetensors.torch import load, save

    plain = load(hostile.lora_files()["kohya"])
    bundle = {"bundle_emb.mika.string_to_param.*": torch.ones(2, 768), "bundle_emb.mika.clip_g": torch.ones(2, 1280)}
    (tmp_path / "a.safetensors").write_bytes(save({**plain, **bundle}, {"ss_base_model_version": "sd_v1"}))
    code, text = said(["lora", "inspect", str(tmp_path / "a.safetensors")], capsys)
    assert (code, "embeddings of `mika` too, which are left out" in text) == (0, True)
    out = tmp_path / "b.safetensors"
    code, text = said(["lora", "convert", str(tmp_path / "a.safetensors"), "--to", "kohya", "-o", str(out)], capsys)
    assert (code, "left out" in text) == (0, True)
    assert load(out.read_bytes()).keys() == plain.keys()


# ------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "setting",
    [
        "train.gradient_accumulation_steps=1000000000", "train.loss.min_snr_gamma=1e30", "sample.steps=100000",
        "train.micro_batch_size=1000000", "dataset.captions.variants=1000000000", "train.max_steps=99999999999",
        r"network.targets=['(\w+\.?)+x']", r"network.targets=['.*.*.*.*x']", r"network.rank_pattern={'(a+)+$': 2}",
    ],
)  # fmt: skip
def test_an_absurd_setting_is_exit_2(setting: str, capsys: Any) -> None:
    start = time.process_time()
    code, text = said(["check", "quickstart", "--set", setting], capsys)
    assert code == 2, text
    assert setting.split("=")[0] in text
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "pattern",
    [
        r"down_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$",
        r".*attn.*to_.*", r"(attn1|attn2).*to_[qkv]", r"(?:blocks\.\d+)?\.to_q", r"[^.]+\.to_k", "to_q",
    ],
)  # fmt: skip
def test_patterns_that_people_write_are_taken(pattern: str) -> None:
    from emotrain.config.values import takes_forever

    assert not takes_forever(pattern)


def test_own_pictures_on_the_quickstart_bring_neither_its_trigger_nor_its_prompts(tmp_path: Path) -> None:
    from emotrain.config.load import load_preset

    (tmp_path / "own.yaml").write_text("extends: quickstart\ndataset: ./pictures\n", encoding="utf-8")
    (tmp_path / "same.yaml").write_text("extends: quickstart\nnetwork: {rank: 4}\n", encoding="utf-8")
    (tmp_path / "chain.yaml").write_text("extends: same.yaml\ndataset: ./pictures\ntrigger: mika\n", encoding="utf-8")
    own, same, chain = (load_preset(tmp_path / f"{name}.yaml") for name in ("own", "same", "chain"))
    assert (own.dataset.trigger, own.sample.prompts) == (None, ("[trigger]",))
    assert (same.dataset.trigger, len(same.sample.prompts)) == ("inkmoji", 4)
    assert (chain.dataset.trigger, chain.sample.prompts) == ("mika", ("[trigger]",))


# ------------------------------------------------------------ lint


def test_a_bare_folder_names_the_size_it_is_held_against(tmp_path: Path, capsys: Any) -> None:
    for index in range(2):
        Image.effect_noise((300, 300), 90).save(tmp_path / f"{index}.png")
    text = said(["lint", str(tmp_path)], capsys)[1]
    assert "sizes: held against 512 px" in text
    assert "too small for 512" in text
    assert "sizes: held against 64 px" in said(["lint", "builtin:example"], capsys)[1]


def test_counts_of_one_are_in_the_singular(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.png").write_text("no picture", encoding="utf-8")
    text = said(["lint", str(tmp_path)], capsys)[1]
    assert not any(word in text for word in (" 1 errors", "1 warnings", " 1 notes")), text


def test_a_folder_named_like_kohya_s_repeats_says_what_its_name_does(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "10_mika").mkdir()
    Image.effect_noise((600, 600), 90).save(tmp_path / "10_mika" / "a.png")
    text = said(["lint", str(tmp_path)], capsys)[1]
    assert "is seen 10 times an epoch for its name, which is no trigger" in text
    assert "is not seen 10 times an epoch for its name" in said(["lint", str(tmp_path / "10_mika")], capsys)[1]


def test_a_lora_that_cannot_be_written_at_the_end_is_exit_6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import errno

    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if str(target).endswith("lora.safetensors"):
            raise OSError(errno.EROFS, "Read-only file system", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    settings = ["train.max_steps=1", "sample.every=0", "sample.at_start=false", "validate.fraction=0"]
    settings += ["network.targets=[mid_block.*to_q]", "train.loss.baseline=raw"]
    sets = [word for setting in settings for word in ("--set", setting)]
    code, text = said(["run", "quickstart", "--runs-dir", str(tmp_path), "--plain", *sets], capsys)
    assert code == 6, text
    assert "lora.safetensors: cannot be written (Read-only file system)" in text


@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix")
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_is_no_fault(streams: str) -> None:
    import subprocess

    done = subprocess.run(
        f"{sys.executable} -m emotrain presets list {streams}", shell=True, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------ properties


def saved(format: str) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((40, 48), 60).convert("P" if format == "GIF" else "RGB").save(stream, format)
    return stream.getvalue()


PICTURES = {format: saved(format) for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(hostile.TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from(sorted(PICTURES)),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), max_size=6),
    st.floats(0, 1.2),
)
def test_damage_to_a_picture_is_a_problem_of_its_file_or_none(
    format: str, harms: list[tuple[float, bytes]], kept: float
) -> None:
    data = bytearray(PICTURES[format])
    for place, harm in harms:
        at = int(place * (len(data) - 1))
        data[at : at + len(harm)] = harm
    data = data[: int(kept * len(data))]
    for read in (read_header, decode_picture):
        with contextlib.suppress(FileProblem):
            read(bytes(data), path="a")


@given(st.sampled_from(["model", "dataset", "train", "network", "stop", "validate", "sample", "save", "log"]), VALUES)
def test_any_value_of_a_section_is_a_preset_or_its_problem(section: str, value: Any) -> None:
    words = {"model": "builtin:tiny-sd", "dataset": {"folders": [{"path": "builtin:example"}]}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.yaml"
        path.write_bytes(yaml.safe_dump({**words, section: value}).encode("utf-8", "surrogatepass"))
        with contextlib.suppress(ConfigError):
            load_preset(path)


# ------------------------------------------------------------ pictures whose decoders work in one call


def obus(data: bytes) -> list[bytes]:
    """The units of an AVIF picture's bits, all of which say their size in at most four bytes."""
    units, at = [], 0
    while at < len(data):
        size, end = 0, at + 1
        for place in range(4):
            size |= (data[end] & 127) << 7 * place
            end += 1
            if data[end - 1] < 128:
                break
        units.append(data[at : end + size])
        at = end + size
    return units


def with_hidden_frames(count: int) -> bytes:
    """An AVIF picture whose only frame is stored `count` times: each is decoded."""
    buffer = io.BytesIO()
    Image.effect_noise((640, 640), 40).convert("RGB").save(buffer, "AVIF", quality=5)
    data = buffer.getvalue()
    start = data.index(b"mdat") + 4
    units = obus(data[start:])
    bits = b"".join(units[:-1]) + units[-1] * count
    head = bytearray(data[:start])
    head[start - 8 : start - 4] = struct.pack(">I", 8 + len(bits))
    place = data.index(struct.pack(">I", len(data) - start), data.index(b"iloc"))
    head[place : place + 4] = struct.pack(">I", len(bits))
    return bytes(head) + bits


def test_an_avif_of_frames_that_are_never_shown_is_refused_before_it_is_decoded() -> None:
    pytest.importorskip("PIL._avif")
    assert decode_picture(with_hidden_frames(1), path="a.avif").header.width == 640
    with pytest.raises(FileProblem, match="takes far longer"):
        read_header(with_hidden_frames(400), path="a.avif")
    film = io.BytesIO()
    frames = [Image.effect_noise((64, 64), 40).convert("RGB") for _ in range(30)]
    frames[0].save(film, "AVIF", save_all=True, append_images=frames[1:])
    assert decode_picture(film.getvalue(), path="film.avif").header.width == 64


def test_a_tiff_whose_strips_lie_on_each_other_or_have_thousands_of_passes_is_refused() -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 40).save(buffer, "TIFF", compression="tiff_deflate", tiffinfo={278: 1})
    data = buffer.getvalue()
    assert decode_picture(data, path="a.tif").header.width == 64
    at = data.index(struct.pack("<HHI", 279, 3, 64))  # the strips' sizes, 64 of 16 bits
    (table,) = struct.unpack("<I", data[at + 8 : at + 12])
    lying = data[:table] + struct.pack("<H", 65_000) * 64 + data[table + 2 * 64 :]
    with pytest.raises(FileProblem, match="takes far longer"):
        read_header(lying, path="a.tif")
    passes = io.BytesIO()
    Image.effect_noise((2000, 2000), 40).save(passes, "TIFF", compression="jpeg")
    with pytest.raises(FileProblem, match="passes"):
        read_header(passes.getvalue() + b"\xff\xda" * 2000, path="a.tif")
