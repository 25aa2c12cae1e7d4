"""TensorBoard event files from tensorboard's own writer: one event a step, no torch."""

from __future__ import annotations

import html
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emotrain.errors import ConfigError
from emotrain.observers.text import clean
from emotrain.train.events import (
    Event,
    Notice,
    RunEnd,
    RunStart,
    SamplesDrawn,
    StepEnd,
    ValidationEnd,
)

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

FLUSH_S = 20


class TensorBoard:
    """Scalars, sample sheets and the run's facts.

    Tags: `loss`, `loss/observed`, `emo/scalar`, `emo/trust`, `emo/pulse`, `emo/stop_meter`,
    `grad_norm`, `guard/skipped`, `step_s`, `validation/loss`, `validation/scalar`, `validation/best_loss`,
    `validation/drift`, `samples`, `run`. A resumed run writes a second file whose first event tells
    TensorBoard to drop the steps after `start_step` (what `purge_step` of other writers does).

    Args:
        log_dir: folder of the event files; made at `RunStart`.

    Raises:
        ConfigError: the package `tensorboard` is not installed.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._writer: EventFileWriter | None = None
        try:
            import tensorboard.compat.proto.event_pb2  # noqa: F401
            import tensorboard.summary.writer.event_file_writer  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "log.tensorboard is on, but the package `tensorboard` is not installed",
                hint="`pip install tensorboard`, or set `log.tensorboard: false`",
            ) from error

    def handle(self, event: Event) -> None:
        """Write steps, validations, sheets and facts."""
        match event:
            case StepEnd():
                self._scalars(event.step, _step_scalars(event))
            case ValidationEnd():
                self._scalars(event.step, _validation_scalars(event))
            case RunStart():
                self._open(event)
            case SamplesDrawn():
                self._sheet(event)
            case Notice():
                pass
            case RunEnd():
                self._text("run/end", event.step, [("why it ended", event.sentence)])
                self._flush()
            case _:
                pass

    def close(self) -> None:
        """Write what is queued and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, start: RunStart) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.close()
        self._log_dir.mkdir(parents=True, exist_ok=True)
        suffix = f".{os.getpid()}-{start.start_step}"
        self._writer = EventFileWriter(str(self._log_dir), flush_secs=FLUSH_S, filename_suffix=suffix)
        if start.start_step:
            self._add(start.start_step + 1, session_log=SessionLog(status=SessionLog.START))
        facts = [
            ("name", start.name),
            ("optimizer", start.optimizer),
            ("device", start.device),
            ("pictures", str(start.num_images)),
            ("modules", str(start.num_modules)),
            ("parameters", f"{start.num_parameters:,}"),
            *start.facts,
        ]
        self._text("run", start.start_step, facts)

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as FileEvent

        if self._writer is not None:
            self._writer.add_event(FileEvent(wall_time=time.time(), step=step, **content))

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        rows = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step, summary=Summary(value=rows))

    def _sheet(self, event: SamplesDrawn) -> None:
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        try:
            encoded = event.sheet.read_bytes()
            with Image.open(event.sheet) as picture:
                width, height = picture.size
        except OSError:
            return  # the sheet is gone or half written: a picture less, not a run less
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
        self._add(event.step, summary=Summary(value=[Summary.Value(tag="samples", image=image)]))
        prompts = [(f"prompt {i}", text) for i, text in enumerate(event.prompts, start=1)]
        self._text("samples/prompts", event.step, prompts)

    def _text(self, tag: str, step: int, rows: list[tuple[str, str]]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        body = "\n".join(f"    {safe(label)}: {safe(value)}" for label, value in rows)
        plugin = SummaryMetadata.PluginData(plugin_name="text")
        tensor = TensorProto(
            dtype="DT_STRING",
            string_val=[body.encode("utf-8")],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        metadata = SummaryMetadata(plugin_data=plugin)
        value = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._add(step, summary=Summary(value=[value]))


def safe(text: str) -> str:
    """Text for a page that renders markdown and HTML: one clean line, angle brackets escaped."""
    return html.escape(clean(text), quote=False)


def _step_scalars(event: StepEnd) -> dict[str, float]:
    reading = event.reading
    return {
        "loss": event.loss,
        "loss/observed": event.observed_loss,
        "emo/scalar": reading.scalar,
        "emo/trust": reading.trust,
        "emo/pulse": reading.pulse,
        "emo/gain": event.gain,
        "emo/stop_meter": event.stop_meter,
        "grad_norm": event.grad_norm,
        "guard/skipped": float(event.skipped),
        "step_s": event.step_s,
    }


def _validation_scalars(event: ValidationEnd) -> dict[str, float]:
    values = {
        "validation/loss": event.loss,
        "validation/scalar": event.scalar,
        "validation/best_loss": event.best_loss,
    }
    if event.drift is not None:
        values["validation/drift"] = event.drift
    return {tag: value for tag, value in values.items() if not math.isnan(value)}
