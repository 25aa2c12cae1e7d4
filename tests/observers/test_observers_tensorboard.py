from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from emotrain.errors import ConfigError
from emotrain.observers.tensorboard import TensorBoard, safe
from emotrain.train.events import RunEnd, RunStart, SamplesDrawn, StepEnd, ValidationEnd

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from tensorboard.summary.writer import event_file_writer  # noqa: E402

MakeStep = Callable[..., StepEnd]
MakeStart = Callable[..., RunStart]


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_every_curve_of_a_run_is_there_under_its_tag(
    tmp_path: Path, make_step: MakeStep, make_start: MakeStart
) -> None:
    board = TensorBoard(tmp_path / "tensorboard")
    board.handle(make_start())
    for step in range(1, 6):
        board.handle(make_step(step))
    board.handle(ValidationEnd(5, 0.625, -0.25, 1.5, 0.5, 5, 0.625))
    board.handle(RunEnd(5, "signal", "enough", None, 5, 0.625, 1.0))
    board.close()
    board.close()
    found = read(tmp_path / "tensorboard")
    tags = set(found.Tags()["scalars"])
    needed = "loss loss/observed emo/scalar emo/trust emo/pulse grad_norm validation/loss validation/scalar"
    assert tags >= set(needed.split())
    assert [point.step for point in found.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert found.Scalars("emo/pulse")[-1].value == pytest.approx(5e-4)
    assert found.Scalars("validation/scalar")[0].value == -0.25


def test_a_resumed_run_shows_every_step_once(
    tmp_path: Path, make_step: MakeStep, make_start: MakeStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    # within a second and a process its files are told apart by a counter, and read in the order of the letters
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for start, end, loss in ((0, 8, 1.0), (5, 10, 2.0), (7, 12, 3.0)):
        board = TensorBoard(tmp_path)
        board.handle(make_start(start_step=start))
        for step in range(start + 1, end + 1):
            board.handle(make_step(step, loss=loss))
        board.close()
    points = read(tmp_path).Scalars("loss")
    assert [point.step for point in points] == list(range(1, 13))
    assert [point.value for point in points] == [1.0] * 5 + [2.0] * 2 + [3.0] * 5


def test_sample_sheets_are_pictures(tmp_path: Path, make_start: MakeStart, make_step: MakeStep) -> None:
    sheet = tmp_path / "sheet.png"
    Image.new("RGB", (30, 20), "red").save(sheet)
    board = TensorBoard(tmp_path / "tensorboard")
    board.handle(make_start())
    fox = tmp_path / "fox.png"
    Image.new("RGB", (8, 9), "blue").save(fox)
    board.handle(SamplesDrawn(4, (fox, tmp_path / "gone.png"), ("a fox", "a pear"), sheet))
    board.handle(SamplesDrawn(8, (), ("a fox",), tmp_path / "gone.png"))
    board.close()
    pictures = read(tmp_path / "tensorboard").Images("samples")
    assert [(p.step, p.width, p.height) for p in pictures] == [(4, 30, 20)]
    own = read(tmp_path / "tensorboard").Images("samples/1")
    assert [(p.step, p.width, p.height) for p in own] == [(4, 8, 9)]
    assert "samples/2" not in read(tmp_path / "tensorboard").Tags()["images"]
    with Image.open(io.BytesIO(pictures[0].encoded_image_string)) as shown, Image.open(sheet) as drawn:
        assert shown.tobytes() == drawn.tobytes()


def test_text_from_captions_and_names_is_harmless_on_the_page(tmp_path: Path, make_start: MakeStart) -> None:
    hostile = "<script>alert(1)</script>\n\n# head \x1b[2J"
    assert "<" not in safe(hostile)
    assert "\n" not in safe(hostile)
    board = TensorBoard(tmp_path)
    board.handle(make_start(name=hostile, facts=((hostile, hostile),)))
    board.close()
    text = read(tmp_path).Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert all(line.startswith("    ") for line in text.splitlines())


def test_without_the_package_the_user_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard") as caught:
        TensorBoard(tmp_path)
    assert caught.value.hint is not None
    assert "log.tensorboard: false" in caught.value.hint
