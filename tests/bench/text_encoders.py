"""What int8, fp8 and nf4 cost a text encoder: the error of its output, at the real width with few layers.

    python tests/bench/text_encoders.py [--layers 4] [--json FILE]

Weights are random; with `large channels` the norms' weights of three channels are 100 times as large, as trained
language models have such channels. `int8 product` is what a kernel would give that rounds the activations too, each
token by its largest number (bitsandbytes' LLM.int8 without its threshold): emotrain does not do that.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from emotrain.families import quantize
from emotrain.families.memory import BYTES_PER_PARAMETER
from emotrain.families.registry import encoder_configs

MODELS = {  # title -> family, variant, encoder
    "T5-XXL": ("flux", "flux1-dev", "text_encoder_2"),
    "Qwen3-4B": ("zimage", "z-image", "text_encoder"),
    "Qwen3-VL-4B": ("krea2", "krea2-raw", "text_encoder"),
    "Qwen2.5-VL-7B": ("qwen", "qwen-image", "text_encoder"),
}
LARGE, TOKENS, VOCABULARY = 100.0, 48, 1000


class Int8Product(nn.Module):
    """A Linear whose activations are rounded too."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = quantize.RoundedLinear.from_linear(layer, "int8")

    weight = None

    def forward(self, x: Tensor) -> Tensor:
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return self.layer(((x.float() / scale).round() * scale).to(x.dtype))


def build(title: str, layers: int, *, large: bool) -> Any:
    """A text encoder in bfloat16 with few layers and few words."""
    kind, words = encoder_configs(*MODELS[title][:2])[MODELS[title][2]]
    model_class = getattr(transformers, kind)
    count = "num_layers" if "d_model" in words else "num_hidden_layers"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    changed = {**words, count: layers, "vocab_size": VOCABULARY}
    for key in ("layer_types", "max_window_layers"):
        changed.pop(key, None)
    try:
        model = model_class(model_class.config_class(**changed)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    if large:
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.numel() > 1000:
                parameter[[7, 500, 1000]] *= LARGE
    return model


def output(model: Any) -> Tensor:
    """The last hidden states of some tokens, float32 [S, D]."""
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states: Tensor = model(input_ids=ids).last_hidden_state
    return states[0].float()


def measure(title: str, layers: int, *, large: bool) -> list[dict[str, Any]]:
    """A row for each form."""
    plain = build(title, layers, large=large)
    expected = output(plain)
    rows = []
    for form in ("int8", "fp8", "nf4", "int8 product"):
        model = copy.deepcopy(plain)
        if form == "int8 product":
            for parent, name, layer in quantize.base_linears(model):
                setattr(parent, name, Int8Product(layer))
        else:
            quantize.quantize_linears(model, form, torch.device("cpu"))
        started = time.monotonic()
        wrong = output(model) - expected
        error = float(wrong.norm() / expected.norm())
        tokens = (wrong.norm(dim=1) / expected.norm(dim=1)).median()
        rows.append(
            {
                "model": title, "layers": layers, "large channels": large, "form": form, "error": round(error, 4),
                "median of a token": round(float(tokens), 4), "bytes": BYTES_PER_PARAMETER.get(form),
                "s": round(time.monotonic() - started, 1),
            }
        )  # fmt: skip
        del model
    return rows


def main() -> None:
    """All models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for title in args.models:
        for large in (False, True):
            for row in measure(title, args.layers, large=large):
                rows.append(row)
                print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
