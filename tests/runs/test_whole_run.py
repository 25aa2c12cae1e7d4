"""One whole run of each built-in model, from preset to the file in a fresh pipeline."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emotrain.cli.app import main
from emotrain.config.load import load_preset
from emotrain.errors import CheckpointError
from emotrain.families.table import resolve_base
from emotrain.lora.file import LoraFile, read_lora
from emotrain.observers.console import JsonEvents
from emotrain.observers.sheet import GAP, LABEL_WIDTH
from emotrain.pulse.gain import START
from emotrain.pulse.logs import read_log
from emotrain.pulse.replay import replay
from emotrain.pulse.stopping import StopRule
from emotrain.runs import build, finish, start
from emotrain.runs.folder import RunFolder, open_run
from emotrain.runs.loaded import load
from emotrain.train.loop import StopReason
from emotrain.train.state import TrainState

SHORT = (
    "network.targets=[transformer_blocks.0.*to_q]",  # what is not about the modules needs few of them
    "train.max_steps=4",
    "validate.every=2",
    "sample.every=4",
    "sample.steps=2",
    'sample.prompts=["[trigger], rocket"]',
    "save.every=2",
    "save.dtype=fp32",
    "log.tensorboard=false",
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def train(preset: str, runs: Path, *extra: str, name: str = "one", observers=()) -> start.Result:
    return start.run(load_preset(preset, (*SHORT, *extra), name), runs_dir=runs, observers=observers)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Finished runs of the quickstart by what they change, each trained once: to look at, not to write into."""
    runs: dict[tuple[str, ...], start.Result] = {}

    def run(*extra: str) -> start.Result:
        if extra not in runs:
            runs[extra] = train("quickstart", tmp_path_factory.mktemp("finished"), "sample.every=0", *extra)
        return runs[extra]

    return run


@pytest.mark.parametrize(("preset", "model"), [("quickstart", "tiny-sd"), ("quickstart-flux", "tiny-flux")])
def test_a_run_leaves_a_lora_that_draws_the_live_picture_in_a_fresh_pipeline(tmp_path, preset, model):
    result = train(preset, tmp_path, "sample.at_start=false", "network.targets=all")
    folder = result.folder
    assert result.exit_code == 0
    assert result.end.stop_reason == "max_steps"
    for path in (
        *("lora.safetensors", "lora-last.safetensors", "samples/sheet.png"),
        *("metrics.jsonl", "preset.yaml", "report.html"),
    ):
        assert (folder.path / path).is_file(), path
    info = folder.info()
    assert (info["steps"], info["stop_reason"], info["lora"]) == (4, "max_steps", "lora.safetensors")
    rows = [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "scalar", "trust", "pulse", "grad_norm"} <= rows[0].keys()
    live = np.asarray(read_picture(folder.samples_dir / "step-00000004-1.png"), int)
    fresh = np.asarray(draw_fresh(model, folder.lora_last_path, "inkmoji, rocket"), int)
    assert np.abs(live - fresh).max() <= 1
    without = np.asarray(draw_fresh(model, None, "inkmoji, rocket"), int)
    assert np.abs(live - without).max() > 1
    handed_over = np.asarray(draw_fresh(model, folder.lora_path, "inkmoji, rocket"), int)
    own = np.asarray(read_picture(folder.samples_dir / "lora-1.png"), int)
    assert np.abs(own - handed_over).max() <= 1


@pytest.mark.parametrize(
    ("preset", "format"),
    [("quickstart", "diffusers"), pytest.param("quickstart-flux", "kohya", marks=pytest.mark.slow)],
)
def test_the_sheets_last_column_is_drawn_from_the_file(tmp_path, monkeypatch, preset, format):
    def read_as_nothing(path: Path) -> LoraFile:
        lora = read_lora(path)
        return replace(lora, state={key: torch.zeros_like(value) for key, value in lora.state.items()})

    monkeypatch.setattr(finish, "read_lora", read_as_nothing)
    folder = train(preset, tmp_path, f"save.format={format}").folder
    base = np.asarray(read_picture(folder.samples_dir / "step-00000000-1.png"), int)
    assert np.abs(np.asarray(read_picture(folder.samples_dir / "lora-1.png"), int) - base).max() == 0
    assert np.abs(np.asarray(read_picture(folder.samples_dir / "step-00000004-1.png"), int) - base).max() > 0
    width, _ = read_picture(folder.samples_dir / "sheet.png").size
    assert width == LABEL_WIDTH + 3 * (128 + GAP) + GAP


def test_samples_at_other_strengths_are_what_stock_draws_at_them(tmp_path):
    folder = train("quickstart", tmp_path, "sample.strengths=[0.5, 1.0, 2]", "network.targets=all").folder
    names = sorted(path.name for path in folder.samples_dir.glob("strength-*.png"))
    assert {name[:13] for name in names} == {"strength-0.50", "strength-2.00"}
    for strength in (0.5, 2.0):
        path = folder.samples_dir / f"strength-{strength:.2f}-1.png"
        own = np.asarray(read_picture(path), int)
        stock = np.asarray(draw_fresh("tiny-sd", folder.lora_path, "inkmoji, rocket", strength), int)
        assert np.abs(own - stock).max() <= 1
        assert np.abs(own - np.asarray(read_picture(folder.samples_dir / "lora-1.png"), int)).max() > 1
        with Image.open(path) as picture:
            assert f"LoRA strength: {strength:g}" in picture.info["parameters"]
    width, _ = read_picture(folder.samples_dir / "sheet.png").size
    assert width == LABEL_WIDTH + 5 * (128 + GAP) + GAP
    page = (folder.path / "report.html").read_text()
    last = page.index('<figcaption data-step="lora.safetensors">')
    assert page.index("strength 0.5") < page.index("strength 2") < last


@pytest.mark.slow
def test_a_lokr_is_drawn_at_other_strengths_too(tmp_path):
    folder = train("quickstart", tmp_path, "sample.strengths=0.01", "network={type: lokr, targets: all}").folder
    base, weak, own = (
        np.asarray(read_picture(folder.samples_dir / name), int)
        for name in ("step-00000000-1.png", "strength-0.01-1.png", "lora-1.png")
    )
    assert np.abs(own - base).max() > 1
    assert np.abs(weak - base).mean() < 0.1 * np.abs(own - base).mean()


def test_pictures_of_an_earlier_lora_file_do_not_outlive_it(tmp_path, finished):
    folder = RunFolder(Path(shutil.copytree(finished().folder.path, tmp_path / "one")))
    folder.samples_dir.mkdir(exist_ok=True)
    (folder.samples_dir / "lora-1.png").write_bytes(b"of an earlier file")
    (folder.samples_dir / "strength-0.80-1.png").write_bytes(b"of an earlier file")
    loaded = load(load_preset(folder.preset_path, ["sample.every=4"]), lambda event: None)
    loaded.sampler.folder = folder.samples_dir
    finish.draw_written(loaded, TrainState(), folder.lora_path, StopReason.INTERRUPTED, lambda event: None)
    assert not (folder.samples_dir / "lora-1.png").exists()
    assert not (folder.samples_dir / "strength-0.80-1.png").exists()


@pytest.mark.slow
def test_trained_text_encoders_are_part_of_the_file(tmp_path):
    """The prompt goes through the fresh pipeline's own text encoder here, with the LoRA on it."""
    from diffusers import DiffusionPipeline

    folder = train("quickstart", tmp_path, "sample.at_start=false", "network.text_encoder=true").folder
    pipeline = DiffusionPipeline.from_pretrained(
        resolve_base("builtin:tiny-sd"), torch_dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(folder.lora_last_path))
    fresh = pipeline(
        "inkmoji, rocket", width=64, height=64, num_inference_steps=2, guidance_scale=2.0,
        generator=torch.Generator().manual_seed(42),
    ).images[0]  # fmt: skip
    live = np.asarray(read_picture(folder.samples_dir / "step-00000004-1.png"), int)
    assert np.abs(live - np.asarray(fresh.convert("RGB"), int)).max() <= 1
    assert set(read_lora(folder.lora_last_path).parts) == {"unet", "text_encoder"}
    rows = [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows)


def read_picture(path: Path):
    return Image.open(path).convert("RGB")


def draw_fresh(model: str, lora: Path | None, prompt: str, strength: float = 1.0):
    """As a user of diffusers would: from_pretrained, load_lora_weights, a prompt."""
    from diffusers import DiffusionPipeline

    from emotrain.families.loading import load_family

    folder = resolve_base(f"builtin:{model}")
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(str(lora), adapter_name="own")
        pipeline.set_adapters("own", strength)
    family = load_family(f"builtin:{model}")
    words = family.pipeline_kwargs(family.encode_texts([prompt]), family.encode_texts([""]), None)
    generator = torch.Generator().manual_seed(42)
    out = pipeline(**words, width=64, height=64, num_inference_steps=2, generator=generator)
    return out.images[0].convert("RGB")


def test_the_same_seed_gives_the_same_bytes_whoever_watches(tmp_path, finished):
    quiet = finished()
    watched = train("quickstart", tmp_path / "b", observers=[JsonEvents(io.StringIO())])
    last = [r.folder.lora_last_path.read_bytes() for r in (quiet, watched)]
    weights = [data[8 + int.from_bytes(data[:8], "little") :] for data in last]  # the header names the preset
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_the_same_preset_gives_the_same_file(tmp_path, finished):
    again = train("quickstart", tmp_path, "sample.every=0")
    assert again.folder.lora_last_path.read_bytes() == finished().folder.lora_last_path.read_bytes()


def test_a_run_folder_is_never_written_over_and_found_by_name(finished):
    runs = finished().folder.path.parent
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*")}
    with pytest.raises(CheckpointError, match="exists"):
        train("quickstart", runs, "train.max_steps=1")
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*")} == before
    assert open_run("one", runs).name == "one"


def test_continue_starts_from_the_weights_of_another_run(tmp_path, finished):
    """Named as a run, which is one of those beside it wherever one stands, when it is resumed too."""
    first = finished()
    shutil.copytree(first.folder.path, tmp_path / "one")
    words = ("start_from.continue=one", "sample.every=0")
    second = train("quickstart", tmp_path, *words, "train.max_steps=1", name="two")
    more = load_preset("quickstart", (*SHORT, *words, "train.max_steps=2"), "two")
    assert start.resume(second.folder, more, observers=()).end.step == 2
    assert "continue: one\n" in second.folder.preset_path.read_text()
    parents = second.folder.info()["parents"]
    assert [parent["kind"] for parent in parents] == ["continue"]
    assert second.folder.info()["base_loss"] == pytest.approx(first.folder.info()["best_loss"], rel=1e-3)
    assert second.folder.info()["start_loss"] < first.folder.info()["start_loss"]  # the emotion begins where it is


def test_a_stack_lies_under_the_new_lora_and_only_the_new_one_is_exported(tmp_path, finished):
    first = finished()
    stack = f"start_from.stack=[{{path: {first.folder.lora_path}, weight: 1.0}}]"
    second = train("quickstart", tmp_path, stack, "sample.every=0", "train.max_steps=1", "network.rank=2", name="two")
    assert second.folder.info()["base_loss"] == pytest.approx(first.folder.info()["best_loss"], rel=1e-3)
    ranks = {v.shape[0] for k, v in read_lora(second.folder.lora_path).state.items() if k.endswith("lora_A.weight")}
    assert ranks == {2}


def test_gradient_accumulation_hears_the_whole_step(tmp_path):
    result = train("quickstart", tmp_path, "train.gradient_accumulation_steps=3", "sample.every=0")
    losses = [json.loads(line) for line in (result.folder.path / "picture_losses.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in result.folder.metrics_path.read_text().splitlines()]
    for row, metric in zip(losses, metrics, strict=True):
        values = [loss for _, _, loss, *_ in row["samples"]]
        assert len(values) >= 9
        assert sum(values) / len(values) == pytest.approx(metric["loss"], rel=1e-3)


def test_the_emotion_begins_at_the_base_s_mean_loss_unless_it_is_to_hear_as_published(finished):
    rows = {}
    for baseline in ("auto", "raw", "corrected"):
        result = finished(*(() if baseline == "auto" else (f"train.loss.baseline={baseline}",)))
        rows[baseline] = json.loads(result.folder.metrics_path.read_text().splitlines()[0])
    assert rows["auto"]["loss"] == rows["raw"]["loss"] == rows["corrected"]["loss"]  # of the base, in each
    assert rows["auto"]["observed_loss"] == rows["raw"]["observed_loss"] == rows["raw"]["loss"]
    assert rows["raw"]["long"] == rows["raw"]["loss"]
    assert rows["raw"]["scalar"] == 0
    assert rows["auto"]["long"] == pytest.approx(0.75, rel=0.2)  # 0.77 on the held-out pictures
    assert rows["auto"]["scalar"] != 0
    assert rows["corrected"]["long"] == pytest.approx(0.75, rel=0.2)
    assert rows["corrected"]["observed_loss"] != rows["corrected"]["loss"]


@pytest.mark.parametrize("finite", [3, 0])
def test_a_loss_of_the_base_that_is_not_finite_is_not_heard(tmp_path, monkeypatch, finite):
    losses = build.sample_losses

    def some_broken(*words):
        each = losses(*words)
        return torch.where(torch.arange(len(each)) < finite, each, torch.nan)

    monkeypatch.setattr(build, "sample_losses", some_broken)
    info = train("quickstart", tmp_path, "sample.every=0", "train.max_steps=1", "validate.every=99").folder.info()
    assert info["stop_reason"] == "max_steps"
    if finite:
        assert info["start_loss"] == pytest.approx(0.75, rel=0.3)
    else:
        assert info["start_loss"] is None


def test_a_run_that_was_never_better_than_its_base_says_so(tmp_path):
    said = io.StringIO()
    words = (
        "train.optimizer=adamw",
        "train.lr=0.5",
        "train.max_grad_norm=null",
        "sample.every=0",
        "network.targets=attn",
    )
    folder = train("quickstart", tmp_path, *words, observers=[JsonEvents(said)]).folder
    assert folder.info()["best_step"] == 0
    assert "no validation was better" in said.getvalue()
    assert read_lora(folder.lora_path).metadata["ss_steps"] == "0"


@pytest.mark.parametrize("baseline", ["auto", "raw"])
@pytest.mark.parametrize("column", [None, "loss"])
def test_a_replay_of_a_run_feels_what_the_run_felt(finished, baseline, column):
    folder = finished(*(() if baseline == "auto" else (f"train.loss.baseline={baseline}",))).folder
    log = read_log(folder.metrics_path, column)
    felt = replay(log.steps, log.losses, start_loss=log.start_loss, gains=log.gains)
    rows = [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]
    for word in ("scalar", "trust", "pulse", "long"):
        assert [getattr(reading, word) for reading in felt.readings] == [row[word] for row in rows]


def test_no_caption_dropout_and_full_dropout_train_different_loras(tmp_path):
    short = ("sample.every=0", "train.max_steps=1", "validate.every=99", "train.loss.baseline=raw")
    some = train("quickstart", tmp_path, "dataset.captions.dropout=0.0", *short, name="a")
    none = train("quickstart", tmp_path, "dataset.captions.dropout=1.0", *short, name="b")
    assert some.folder.lora_last_path.read_bytes() != none.folder.lora_last_path.read_bytes()


def test_where_nothing_is_held_out_pictures_are_validationd_mirrored_and_as_they_are(tmp_path, monkeypatch):
    observed_loss = []
    hear = StopRule.update_validation
    monkeypatch.setattr(
        StopRule, "update_validation", lambda rule, *told: (observed_loss.append(told), hear(rule, *told))[1]
    )
    short = ("sample.every=0", "train.max_steps=1", "validate.every=1", "train.loss.baseline=raw")
    train("quickstart", tmp_path, "validate.fraction=0", *short, name="all")
    train("quickstart", tmp_path, *short, name="held")
    assert [step for step, *_ in observed_loss] == [0, 1] * 2
    for _, flipped, plain, *pictures in observed_loss[:2]:
        assert 0.3 < plain < flipped < 0.9  # the base knows these shapes as they are
        assert [sum(each) / len(each) for each in pictures] == pytest.approx([flipped, plain])
    assert [(told[2], len(told[3]), told[4]) for told in observed_loss[2:]] == [(None, 4, [])] * 2


def test_the_offer_to_train_on_all_pictures_can_be_run_as_it_is_printed(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(StopRule, "decide", lambda self, step: "enough" if step == 4 else None)
        result = train("quickstart", tmp_path, "sample.every=0", "train.max_steps=9")
    assert (result.end.stop_reason, len(result.folder.info()["held_out"])) == ("signal", 4)
    command = shlex.split(result.end.all_command)
    assert command[0] == "emotrain"
    assert main([*command[1:], "--runs-dir", str(tmp_path), "--plain"]) == 0
    folder = open_run(tmp_path / "one-all")
    info = folder.info()
    assert (info["steps"], info["best_step"], info["held_out"]) == (result.end.best_step, result.end.best_step, [])
    settings = load_preset(folder.preset_path).train
    assert (settings.gain, settings.lr) == ("fixed", pytest.approx(START))
    assert "32 pictures" in capsys.readouterr().err
