"""`validate.likeness`: samples and pictures compared by a vision model, and nothing else changed by it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from emotrain.cli.app import main
from emotrain.config.load import load
from emotrain.errors import ExitCode, ModelError
from emotrain.observers.console import ConsoleLines
from emotrain.observers.metrics_log import MetricsLog
from emotrain.runs import likeness, start
from emotrain.runs.folder import RunFolder
from emotrain.runs.preflight import preflight
from emotrain.runs.report import page_of
from emotrain.train.events import Event, LikenessMeasured, Notice, RunStart

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGHT = {**SIZES, "image_size": 32, "patch_size": 8}
ASPECT = {"shortest_edge": 32}
WORDS = (
    "train.max_steps=2", "train.loss.baseline=raw", "network.targets=[mid_block.*to_q]", "validate.every=100",
    "sample.every=1", "sample.steps=2", "sample.prompts=['[trigger]']",
)  # fmt: skip


def clip() -> tuple[Any, Any]:
    text = {**SIZES, "vocab_size": 64, "max_position_embeddings": 8}
    config = hf.CLIPConfig(text_config=text, vision_config=SIGHT, projection_dim=16)
    return hf.CLIPModel(config), hf.CLIPImageProcessorPil(size=ASPECT, crop_size={"height": 32, "width": 32})


def clip_vision() -> tuple[Any, Any]:
    config = hf.CLIPVisionConfig(**SIGHT, projection_dim=16)
    processor = hf.CLIPImageProcessorPil(size=ASPECT, crop_size={"height": 32, "width": 32})
    return hf.CLIPVisionModelWithProjection(config), processor


def dinov2() -> tuple[Any, Any]:
    processor = hf.BitImageProcessorPil(size=ASPECT, crop_size={"height": 32, "width": 32})
    return hf.Dinov2Model(hf.Dinov2Config(**SIGHT)), processor


def dino() -> tuple[Any, Any]:
    return hf.ViTModel(hf.ViTConfig(**SIGHT), add_pooling_layer=False), hf.ViTImageProcessorPil(size=32)


MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "clip": clip, "clip_vision": clip_vision, "dinov2": dinov2, "dino": dino,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("vision")

    def of(name: str) -> Path:
        folder = place / name
        if not folder.exists():
            torch.manual_seed(7)
            model, processor = MAKERS[name]()
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        return folder

    return of


def stock(name: str, folder: Path, picture: Image.Image) -> torch.Tensor:
    """The embedding as the model's own page takes it: CLIP's projection, DINO's class token."""
    model, processor = MAKERS[name]()
    model = type(model).from_pretrained(folder, **({"add_pooling_layer": False} if name == "dino" else {})).eval()
    pixels = type(processor).from_pretrained(folder)(images=picture, return_tensors="pt")
    with torch.no_grad():
        if name == "clip":
            return model.get_image_features(**pixels).pooler_output[0]
        seen = model(**pixels)
        return seen.image_embeds[0] if name == "clip_vision" else seen.last_hidden_state[0, 0]


@pytest.mark.parametrize("name", MAKERS)
def test_the_embedding_is_the_models_own(folder_of: Callable[[str], Path], name: str) -> None:
    folder = folder_of(name)
    noise = np.random.default_rng(3).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    before = torch.get_rng_state()
    likeness.refuse_unusable(folder)
    assert torch.equal(torch.get_rng_state(), before)
    ours = likeness.load_embedder(folder)(picture)
    assert float(ours.norm()) == pytest.approx(1.0, abs=1e-5)
    assert float(cosine_similarity(ours, stock(name, folder, picture), dim=0)) == pytest.approx(1.0, abs=1e-5)


def test_a_preprocessing_that_has_no_form_without_torchvision_is_done_all_the_same(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SIGHT)).eval()
    model.save_pretrained(tmp_path)
    hf.ViTImageProcessorPil(size=32).save_pretrained(tmp_path)
    pixels = hf.ViTImageProcessorPil.from_pretrained(tmp_path)(
        images=Image.new("RGB", (60, 40), "teal"), return_tensors="pt"
    )
    words = json.loads((tmp_path / "preprocessor_config.json").read_text())
    words["image_processor_type"] = "DINOv3ViTImageProcessorFast"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(words))
    likeness.refuse_unusable(tmp_path)
    ours = likeness.load_embedder(tmp_path)(Image.new("RGB", (60, 40), "teal"))
    with torch.no_grad():
        stocks = model(**pixels).last_hidden_state[0, 0]
    assert float(cosine_similarity(ours, stocks, dim=0)) == pytest.approx(1.0, abs=1e-5)


def test_the_value_is_the_mean_over_all_pairs(tmp_path: Path) -> None:
    told: list[Event] = []
    reference = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    one = likeness.Likeness(tmp_path, reference, (0, 1), told.append)
    assert one.among == pytest.approx(0.6)
    seen = torch.tensor([[0.0, 1.0], [0.8, 0.6]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likeness, "embeddings", lambda folder, paths: seen[: len(paths)])
        one.at_step(0, [tmp_path, tmp_path])
        one.own = (1,)
        one.at_step(5, [tmp_path, tmp_path])
    events = [event for event in told if isinstance(event, LikenessMeasured)]
    assert events[0].likeness == pytest.approx((0.0 + 0.8 + 0.8 + 0.96) / 4)
    assert events[1].likeness == pytest.approx((0.0 + 0.8) / 2)
    assert events[1].base_likeness == events[0].likeness == one.base
    assert events[1].curves() == {"likeness": events[1].likeness}
    stream = io.StringIO()
    ConsoleLines(stream=stream).handle(events[1])
    said = "likeness at step 5: 0.4000 (base model 0.6400, pictures among themselves 0.6000)\n"
    assert stream.getvalue() == said


def test_a_resumed_run_keeps_the_bases_value_and_cuts_the_log(tmp_path: Path) -> None:
    told: list[Event] = []
    first = likeness.Likeness(tmp_path, torch.eye(2), (0,), told.append)
    first.base, first.last = 0.25, 0.5
    log = MetricsLog(tmp_path)
    for step in (0, 2, 4):
        log.handle(LikenessMeasured(step, 0.25, 0.25))
    log.close()
    second = likeness.Likeness(tmp_path, torch.eye(2), (0,), told.append)
    second.go_on(json.loads(json.dumps(first.summary())))
    assert (second.base, second.last) == (0.25, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likeness, "embeddings", lambda folder, paths: torch.eye(2)[:1])
        second.at_step(4, [tmp_path])
    assert second.summary()["last"] == 0.5
    event = told[-1]
    assert isinstance(event, LikenessMeasured)
    assert (event.likeness, event.base_likeness, event.among_pictures) == (0.5, 0.25, 0.0)
    for damaged in (None, [], {}, {"base": "0.3"}):
        third = likeness.Likeness(tmp_path, torch.eye(2), (0,), told.append)
        third.go_on(damaged)
        assert third.base is None
    log = MetricsLog(tmp_path)
    log.handle(RunStart("one", tmp_path, 2, 9, 1.0, "emosens", 3, 1, 1, "cpu"))
    log.handle(event)
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "likeness.jsonl").read_text().splitlines()] == [0, 2, 4]


def trained(runs: Path, name: str, *words: str) -> tuple[RunFolder, list[Event]]:
    told: list[Event] = []

    class Listener:
        def handle(self, event: Event) -> None:
            told.append(event)

        def close(self) -> None:
            """Nothing to close."""

    preset = load("quickstart", [*WORDS, *words], name).preset
    return start.run(preset, runs_dir=runs, observers=[Listener()]).folder, told


def test_a_run_tells_its_likeness_everywhere_and_is_the_same_to_the_last_bit(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("dinov2")
    plain, _ = trained(tmp_path, "plain")
    run, told = trained(tmp_path, "looked", f"validate.likeness={folder}")
    ours, theirs = load_file(run.lora_path), load_file(plain.lora_path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    losses = [[json.loads(line)["loss"] for line in one.metrics_path.read_text().splitlines()] for one in (run, plain)]
    assert losses[0] == losses[1]

    events = [event for event in told if isinstance(event, LikenessMeasured)]
    assert [event.step for event in events] == [0, 1, 2]
    rows = [json.loads(line) for line in (run.path / "likeness.jsonl").read_text().splitlines()]
    assert [row["likeness"] for row in rows] == [event.likeness for event in events]
    info = run.info()["likeness"]
    assert info["base"] == events[0].likeness
    assert info["last"] == events[-1].likeness
    assert info["model"] == "dinov2"
    assert -1.0 <= info["lora"] <= 1.0
    assert -1.0 <= info["pictures"] <= 1.0
    assert len(run.info()["held_out"]) > 1  # so that there are pairs
    page = page_of(run)
    assert ">likeness</text>" in page
    assert ">pictures</text>" in page
    assert f"{info['lora']:.3f} (without: {info['base']:.3f})" in page
    assert not (plain.path / "likeness.jsonl").exists()
    assert ">likeness</text>" not in page_of(plain)


def test_a_model_that_goes_away_costs_the_measurement_alone(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    shutil.copytree(folder_of("dino"), folder)
    told: list[Event] = []
    one = likeness.Likeness(folder, torch.ones(1, 32), (0,), told.append)
    shutil.rmtree(folder)
    one.at_step(3, [tmp_path / "step.png"])
    assert one.last is None
    assert one.among is None
    notices = [event.message for event in told if isinstance(event, Notice)]
    assert len(notices) == 1
    assert "is no vision model" in notices[0]


def spoil(kind: str, folder: Path) -> None:
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "a text model":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    elif kind == "no preprocessing":
        (folder / "preprocessor_config.json").unlink()
    elif kind == "no weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif kind == "other weights":
        torch.manual_seed(1)
        hf.BertModel(hf.BertConfig(**SIZES, vocab_size=16)).save_pretrained(folder / "other")
        (folder / "other" / "model.safetensors").replace(folder / "model.safetensors")
    elif kind == "cut":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "kind", ["not there", "no config", "a text model", "no preprocessing", "no weights", "other weights", "cut"]
)
def test_check_and_run_refuse_what_is_no_vision_model(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "eye"
    shutil.copytree(folder_of("dinov2"), folder)
    spoil(kind, folder)
    preset = load("quickstart", ["network.targets=[mid_block.*to_q]", f"validate.likeness={folder}"], "one").preset
    failures = preflight(preset).failures
    assert len(failures) == 1
    failure = failures[0]
    assert isinstance(failure, ModelError)
    assert failure.exit_code == ExitCode.MODEL
    assert failure.message.count("validate.likeness") == 1
    assert str(folder) in failure.message
    assert failure.hint
    with pytest.raises(ModelError) as refused:
        start.run(preset, runs_dir=tmp_path / "runs", observers=[])
    assert failure.message.endswith(refused.value.message)
    assert not (tmp_path / "runs" / "one").exists()


def test_at_the_command_line_both_say_the_same_words(
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "eye"
    shutil.copytree(folder_of("clip"), folder)
    (folder / "preprocessor_config.json").unlink()
    said = []
    for verb in ("check", "run"):
        assert main([verb, "quickstart", "--set", f"validate.likeness={folder}"]) == ExitCode.MODEL
        said.append([line for line in capsys.readouterr().err.splitlines() if "preprocessor_config" in line])
    assert len(said[0]) == 2  # what is wrong, and the hint
    assert said[0] == said[1]


def test_it_says_where_it_has_no_effect() -> None:
    notes = load("quickstart", ["validate.likeness=./eye", "sample.every=0"], "one").notes
    assert any("validate.likeness has no effect" in note for note in notes)
