"""Small models of the newer families through the command line: a run of two steps with samples, its file checked.

python tests/gpu/pretend_cuda.py run tests/gpu/families.py [KIND ...]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))

from newer_models import (  # noqa: E402
    anima_files,
    anima_parts,
    modular_pipeline_of,
    pipeline_of,
    save_folder,
    t5,
)

from emotrain.cli.app import main as emotrain  # noqa: E402
from emotrain.lora.file import read_lora  # noqa: E402

KINDS = ("zimage", "flux2", "flux2-dev", "krea2", "qwen", "chroma", "qwen21", "flux3", "anima", "anima-files")
MODULAR = ("qwen21", "flux3", "anima")
REST = (
    "dataset: {trigger: rkt, resolution: 64, buckets: {step: 64, min: 64}, folders: [{path: builtin:example}]}\n"
    "network: {rank: 2}\ntrain: {max_steps: 2, gradient_checkpointing: true}\nvalidate: {every: 2, probe_images: 2}\n"
    'save: {every: 2}\nsample: {every: 2, steps: 2, prompts: ["a [trigger]"]}\nstop: {mode: "off"}\n'
)


def saved(kind: str, folder: Path) -> dict[str, str]:
    """A small random model as a folder, Anima as its three files too; `model`'s keys of a preset."""
    if kind != "anima-files":
        pipeline = modular_pipeline_of(kind) if kind in MODULAR else pipeline_of(kind)
        return {"base": str(save_folder(kind, pipeline, folder))}
    anima_files(anima_parts(t5(32)[1]), folder)
    files = {"base": "anima", "vae": "vae", "text_encoder": "text_encoder"}
    return {key: str(folder / f"{name}.safetensors") for key, name in files.items()}


def whole_run(kind: str, work: Path) -> None:
    """Check, plan, and two steps on the GPU, saved and checked.

    Raises:
        AssertionError: the run fails, or did not train on the GPU.
    """
    preset = work / f"{kind}.yaml"
    preset.write_text(f"model: {json.dumps(saved(kind, work / kind))}\n{REST}", encoding="utf-8")
    for words in (["check", str(preset)], ["plan", str(preset)], ["run", str(preset), "--plain"]):
        code = emotrain([*words, "--runs-dir", str(work / "runs")] if words[0] == "run" else words)
        assert code == 0, f"{kind}: {words[0]} ends with exit code {code}"
    folder = work / "runs" / kind
    assert json.loads((folder / "run.json").read_text())["device"].startswith("cuda"), kind
    assert read_lora(folder / "lora.safetensors").family == kind.split("-")[0]
    assert list((folder / "samples").glob("lora-1.png")), kind


def main() -> None:
    """All kinds, or those that are named."""
    assert torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as work:
        for kind in sys.argv[1:] or KINDS:
            whole_run(kind, Path(work))
            print(f"== {kind}: well", flush=True)


if __name__ == "__main__":
    main()
