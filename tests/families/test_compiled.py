"""Compiled blocks compute what plain ones do, and give way to them where compiling fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emotrain.batch import Conditioning
from emotrain.config.load import load_preset
from emotrain.families.blocks import checkpoint_blocks, compile_blocks
from emotrain.families.loading import load_family
from emotrain.families.table import FAMILIES
from emotrain.lora.adapter import Adapter, add_adapter
from emotrain.lora.half import HalfLora
from emotrain.lora.inject import initialise, install, set_weights
from emotrain.runs.build import compile_model
from emotrain.train.events import Event, Notice


class Block(nn.Module):
    """A linear layer and an activation: what a denoiser repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before or after."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit
    torch._functorch.config.force_non_lazy_backward_lowering = False


def made() -> tuple[Net, HalfLora]:
    """The same bfloat16 model each time, with a LoRA that does something."""
    torch.manual_seed(0)
    net = Net().requires_grad_(False).to(torch.bfloat16)
    paths = [f"blocks.{number}.linear" for number in range(3)]
    layers = install(net, dict.fromkeys(paths, 4), dict.fromkeys(paths, 4.0), "default")
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        initialise(layer, "default", generator)
        sizes = (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape)
        set_weights(layer, "default", *(0.2 * torch.randn(size, generator=generator) for size in sizes))
    return net, HalfLora(net, layers, "default", torch.bfloat16)


def passes(net: Net, half: HalfLora, sizes: tuple[int, ...] = (5, 9, 3)) -> tuple[list[Tensor], Tensor]:
    """Outputs of inputs of several sizes, and the gradient of all."""
    outputs = []
    for size in sizes:
        x = torch.randn(2, size, 16, generator=torch.Generator().manual_seed(size)).to(torch.bfloat16)
        y = net(x.requires_grad_())
        y.float().pow(2).mean().backward()
        outputs.append(y.detach())
    return outputs, half.grads.clone()


class Counting:
    """A backend that runs what it is given, and counts."""

    def __init__(self) -> None:
        self.compiled = self.ran = 0

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return graph.forward(*args)

        return run


def test_compiled_blocks_give_the_same_with_few_forms_for_all_sizes() -> None:
    outputs, gradient = passes(*made())
    net, half = made()
    said: list[str] = []
    compile_blocks(net, ["Block"], said.append, backend="aot_eager")
    compiled, its_gradient = passes(net, half)
    for one, other in zip(outputs, compiled, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient, its_gradient, rtol=2e-2, atol=1e-3)
    assert gradient.abs().max() > 1e-3
    assert said == []
    net, half = made()
    counting = Counting()
    compile_blocks(net, ["Block"], said.append, backend=counting)
    passes(net, half)
    once = counting.compiled
    assert 0 < once < counting.ran == 9
    passes(net, half, (7, 11, 13))
    assert counting.compiled == once  # other sizes need no other form


def test_passes_without_gradients_are_not_compiled() -> None:
    net, _ = made()
    counting = Counting()
    compile_blocks(net, ["Block"], lambda line: None, backend=counting)
    with torch.no_grad():
        net(torch.randn(1, 4, 16).to(torch.bfloat16))
    assert counting.ran == 0


def fails(graph: Any, inputs: Any) -> Any:
    raise OSError("no compiler\nis here")


def fails_backward(graph: Any, inputs: Any) -> Any:
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=fails)(graph, inputs)


@pytest.mark.parametrize("backend", [fails, pytest.param(fails_backward, marks=pytest.mark.slow)])
def test_what_cannot_be_compiled_runs_as_it_is_and_is_said_once(backend: Any) -> None:
    outputs, gradient = passes(*made())
    net, half = made()
    said: list[str] = []
    compile_blocks(net, ["Block"], said.append, backend=backend)
    plain, its_gradient = passes(net, half)
    assert all(torch.equal(one, other) for one, other in zip(outputs, plain, strict=True))
    assert torch.equal(gradient, its_gradient)
    assert said == ["the model's blocks are not compiled: no compiler"]


def test_an_error_of_the_model_itself_is_raised() -> None:
    net, _ = made()
    compile_blocks(net, ["Block"], lambda line: None, backend="eager")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(torch.randn(1, 4, 8).to(torch.bfloat16).requires_grad_())


@pytest.mark.parametrize(
    ("words", "memory", "why"),
    [
        ([], None, []),
        (["train.compile=false"], None, []),
        (["train.compile=true", "train.deterministic=true"], None, ["train.deterministic is true"]),
        (["train.compile=true"], SimpleNamespace(offload=True), ["its blocks wait in the computer's memory"]),
        (["train.compile=true"], None, None),
    ],
)
def test_the_preset_decides_and_what_is_not_compiled_is_said(words: list[str], memory: Any, why: Any) -> None:
    net, _ = made()
    before = [block.forward for block in net.blocks]
    there: Any = SimpleNamespace(denoiser=net, memory=memory, name="zimage")
    net.blocks[0].__class__ = type("ZImageTransformerBlock", (Block,), {})
    said: list[Event] = []
    compile_model(load_preset("quickstart", words), there, said.append)
    changed = [block.forward != was for block, was in zip(net.blocks, before, strict=True)]
    assert changed == [why is None, False, False]
    wanted = ["blocks are compiled: the first steps take minutes longer"] if why is None else why
    texts = [event.message for event in said if isinstance(event, Notice) and event.level == "info"]
    assert len(said) == len(texts) == len(wanted)
    assert all(word in text for word, text in zip(wanted, texts, strict=True))


def test_a_torch_without_the_settings_runs_the_blocks_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo, "config", SimpleNamespace(cache_size_limit=8))  # as torch 2.6 has it
    said: list[Any] = []
    there: Any = SimpleNamespace(denoiser=made()[0], memory=None, name="zimage")
    compile_model(load_preset("quickstart", ["train.compile=true"]), there, said.append)
    assert [event.message for event in said] == [
        f"the model is not compiled: torch {torch.__version__} is too old for it"
    ]


def predictions(folder: Path, *, compiled: bool, checkpointed: bool) -> tuple[list[Tensor], Tensor]:
    """Of a real kind of model with a LoRA in bfloat16: predictions at three sizes and the gradient of all."""
    family = load_family(str(folder), dtype="bf16", device="cpu")
    adapter: Adapter = add_adapter(family.denoiser, rank=4, targets="attn-mlp", family=family.name, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    text = family.encode_texts(["a cat"])
    family.place_denoiser()
    adapter.use_half_precision(family.dtype)
    if checkpointed:
        checkpoint_blocks(family.denoiser)
    if compiled:
        compile_blocks(family.denoiser, FAMILIES[family.name].blocks, lambda line: None, backend="aot_eager")
    outputs = []
    for height, width in ((8, 8), (8, 16), (16, 8)):
        noise = torch.randn(1, 8, height, width, generator=torch.Generator().manual_seed(height + 2 * width))
        sizes = torch.tensor([[height * 8, width * 8]])
        at = torch.tensor([500.0])
        out = family.predict(noise, at, text, Conditioning(sizes, torch.zeros_like(sizes), sizes))
        out.pow(2).mean().backward()
        outputs.append(out.detach())
    adapter.collect_gradients()
    return outputs, torch.cat([gradient.flatten() for gradient in adapter.gradients()])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "checkpointed"), [("sd_folder", False), ("flux_folder", True)])
def test_models_of_real_kinds_compile(kind: str, checkpointed: bool, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    plain, gradient = predictions(folder, compiled=False, checkpointed=checkpointed)
    compiled, its_gradient = predictions(folder, compiled=True, checkpointed=checkpointed)
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
    assert (gradient - its_gradient).norm() < 0.02 * gradient.norm()
