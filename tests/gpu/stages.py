"""What the GPU check looks at: each stage by its name, in this process; one line of JSON for each thing that is known.

    python tests/gpu/stages.py NAME [--tiny]

`check.py` runs them all, each with its time limit.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "bench"), str(HERE.parents[1])]

import bare
import models
import real_size
import torch

from emotrain.cli.app import main as emotrain_main
from emotrain.families import quantize
from emotrain.families.blocks import checkpoint_blocks, compile_blocks
from emotrain.families.common import LoadedFamily
from emotrain.families.loading import load_family
from emotrain.families.memory import CONTEXT_GIB, MemoryPlan
from emotrain.families.registry import FAMILIES, family_of_variant
from emotrain.lora.adapter import Adapter, add_adapter
from emotrain.optim import kernels
from emotrain.optim.averaged import Averaged
from emotrain.optim.registry import build_optimizer
from emotrain.ranks import JoinedRanks
from emotrain.train import rng
from emotrain.train.graphs import Graphs
from emotrain.train.loop import Limits, accumulate, train_step
from emotrain.train.state import TrainState

GIB = 2**30
CUDA = torch.device("cuda")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch")
Rows = Iterator[dict[str, Any]]


def row(what: str, ok: bool | None = None, **numbers: Any) -> dict[str, Any]:
    """One thing that is known; `ok` None where it is a number and no claim."""
    return {"what": what, "ok": ok, **numbers}


def emotrain(*words: str) -> tuple[int, str]:
    """A command in this process: its exit code and what it said on stdout."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = emotrain_main(list(words))
    clean()
    return int(code or 0), said.getvalue()


def clean() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    """GiB of tensors at most since `clean`."""
    return torch.cuda.max_memory_allocated() / GIB


def pretended() -> dict[str, int] | None:
    """Pretend CUDA's own counts; None on a real GPU."""
    if "pretend_ext" not in sys.modules:
        return None
    import pretend_cuda

    return pretend_cuda.counts()


def first() -> int:
    """Steps that are not timed: of a shape the first ones choose kernels, are compiled and recorded."""
    return 3 if pretended() is None else 1


def launches(work: Callable[[], Any]) -> int:
    """Kernels that `work` starts."""
    before = pretended()
    if before is not None:
        work()
        return pretended()["operators"] - before["operators"]  # type: ignore[index]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as found:
        work()
        torch.cuda.synchronize()
    return sum(event.count for event in found.key_averages() if event.key in LAUNCHES)


def blocking(work: Callable[[], Any]) -> int:
    """How often the host waits for the device in `work`."""
    before = pretended()
    if before is not None:
        work()
        after = pretended()
        assert after is not None
        return sum(after[key] - before[key] for key in ("syncs", "d2h", "pageable"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


class Trainer:
    """A model with random weights and a LoRA, and the loop's own step on it."""

    def __init__(
        self,
        family: LoadedFamily,
        size: int,
        *,
        checkpointing: bool = False,
        compiled: Sequence[str] = (),
        recorded: bool = False,
    ) -> None:
        if family.vae is not None:
            family._identities = {"vae": "", "text": ""}
            family.free_encoders()
        self.adapter = add_adapter(family.denoiser, rank=16, targets="attn-mlp", family=family.name, seed=0)
        family.place_denoiser()
        self.adapter.use_half_precision(family.dtype)
        if checkpointing:
            checkpoint_blocks(family.denoiser)
        self.said: list[str] = []
        # pretend CUDA has no compiler, but all that comes before one
        backend = "inductor" if pretended() is None else "aot_eager"
        self.compiled = None
        if compiled:
            self.compiled = compile_blocks(family.denoiser, compiled, self.said.append, backend=backend)
        optimizer = Averaged(build_optimizer("emosens", self.adapter.parameters(), lr=None, notify=False))
        self.graphs = Graphs(CUDA, lambda: self.adapter.half_gradients, self.said.append) if recorded else None
        self.parts = replace(real_size.loop_parts(family, self.adapter, optimizer, size), graphs=self.graphs)
        self.state, self.limits = TrainState(), Limits(1000, 1, 1.0, 0, 10, 10, 0)

    def step(self) -> float:
        """One step; its loss, which is also the wait for the device."""
        done = train_step(self.parts, self.limits, self.state)
        return float("nan") if done is None else done[0]

    def measure(self, steps: int) -> dict[str, Any]:
        """Seconds a step, memory, losses."""
        clean()
        started = time.perf_counter()
        losses = [self.step() for _ in range(first())]
        warm_up = time.perf_counter() - started
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            losses.append(self.step())
            seconds.append(time.perf_counter() - started)
        return {
            "s_step": statistics.median(seconds), "warm_up_s": warm_up, "peak_gib": peak(),
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB, "loss": losses[-1],
            "finite": all(loss == loss for loss in losses), **({"said": self.said} if self.said else {}),
            **({"works": self.compiled.works} if self.compiled else {}),
        }  # fmt: skip

    def count(self) -> dict[str, Any]:
        """Launches and waits of a step: apart, since a profiler that fails must not take a time with it."""
        return {"launches": launches(self.step), "waits": blocking(self.step)}


def doctor(tiny: bool) -> Rows:
    """What the machine is."""
    code, said = emotrain("doctor", "--json")
    facts = json.loads(said)
    device = facts["devices"][1] if len(facts["devices"]) > 1 else {}
    versions = {name: facts[name] for name in ("torch", "diffusers", "transformers", "peft", "optional")}
    yield row("a GPU is seen", code == 0 and bool(device), **device, **versions, cuda=torch.version.cuda)


def quickstart(tiny: bool) -> Rows:
    """The built-in models: train, draw, save, resume."""
    steps = 4 if tiny else 40
    for preset in ("quickstart", "quickstart-flux"):
        with tempfile.TemporaryDirectory() as work:
            clean()
            words = [f"save.every={steps // 2}", f"sample.every={steps}", f"sample.steps={2 if tiny else 4}"]
            words += ["sample.at_start=false", "validate.probe_images=1", "train.loss.baseline=raw"] if tiny else []
            sets = ["--plain", "--runs-dir", work, *(word for pair in words for word in ("--set", pair))]
            code, _ = emotrain("run", preset, *sets, "--set", f"train.max_steps={steps}")
            folder, half = Path(work) / preset, Path(work) / "half"
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            good = code == 0 and (folder / "lora.safetensors").exists() and (folder / "samples" / "sheet.png").exists()
            s_step = statistics.median(line["step_s"] for line in lines[2:])
            yield row(f"{preset}, {steps} steps", good, s_step=s_step, loss=lines[-1]["loss"])
            code, _ = emotrain("run", preset, "--name", "half", *sets, "--set", f"train.max_steps={steps // 2}")
            again, _ = emotrain("resume", str(half), "--plain", "--set", f"train.max_steps={steps}")
            other = [json.loads(line) for line in (half / "metrics.jsonl").read_text().splitlines()]
            apart = max(abs(one["loss"] - two["loss"]) for one, two in zip(lines, other, strict=False))
            good = not code and not again and len(other) == steps
            yield row(f"{preset}, resumed half-way", good, largest_difference=apart)
            if tiny:  # pretend CUDA records nothing
                continue
            graphs = ["--set", "train.cuda_graphs=true", "--set", f"train.max_steps={steps}"]
            code, _ = emotrain("run", preset, "--name", "recorded", *sets, *graphs)
            text = (Path(work) / "recorded" / "metrics.jsonl").read_text()
            found = [json.loads(line) for line in text.splitlines()]
            apart = max(abs(one["loss"] / two["loss"] - 1) for one, two in zip(lines, found, strict=False))
            times = s_step / statistics.median(line["step_s"] for line in found[2:])
            good = not code and len(found) == steps and apart < 0.02
            yield row(f"{preset}, recorded", good, largest_difference=apart, times_eager=times)


def exact(tiny: bool) -> Rows:
    """Equal runs: verify-resume, and bits of one backward pass."""
    steps = "3" if tiny else "5"
    # pretend CUDA's kernels are the CPU's: the second would say the same
    for words in ([],) if tiny else ([], ["--set", "train.deterministic=false"]):
        done = subprocess.run(
            [sys.executable, "-m", "emotrain", "verify-resume", "quickstart", "--steps", steps, "--json", *words],
            capture_output=True, text=True, cwd=HERE.parents[1],
        )  # fmt: skip
        found = json.loads(done.stdout) if done.stdout.startswith("{") else {}
        name = "verify-resume" + (", common kernels" if words else "")
        equal, compared = found.get("equal", False), found.get("compared", [])
        numbers: dict[str, Any] = {"apart": max((one["apart"] for one in compared), default=None)}
        if not compared:
            numbers["why"] = (done.stdout + done.stderr)[-300:]
        yield row(name, None if words else equal, equal_bits=equal, **numbers)
    for wanted in (True, False):
        rng.deterministic_kernels(wanted)
        clean()
        size = 64 if tiny else 1024
        family = real_size.build("sdxl", torch.bfloat16, CUDA, models.change("sdxl", tiny))
        trainer = Trainer(family, size, checkpointing=True)
        twice, seconds = [], []
        for _ in range(3):
            started = time.perf_counter()
            accumulate(trainer.parts, trainer.limits, trainer.state)
            twice.append([gradient.clone() for gradient in trainer.adapter.gradients()])
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            trainer.adapter.drop_gradients()
        equal = all(torch.equal(one, two) for one, two in zip(*twice[1:], strict=True))
        name = f"SDXL backward twice, deterministic: {wanted}".lower()
        yield row(name, equal if wanted else None, equal_bits=equal, s_backward=seconds[-1])
        del family, trainer, twice


def ranks(tiny: bool) -> Rows:
    """What several GPUs do each step, in a group of one: NCCL begins, adds up SDXL's gradients, tells what it has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    device = CUDA if pretended() is None else torch.device("cpu")  # pretend CUDA has no NCCL
    joined = JoinedRanks()
    trained = [torch.nn.Parameter(torch.zeros(1000 if tiny else 23_220_000 // 8, device=device)) for _ in range(8)]
    for number, parameter in enumerate(trained[:-1]):
        parameter.grad = torch.full_like(parameter, number + 0.5)
    numbers, seconds = torch.tensor([3.0, 4.0], device=device), []
    for _ in range(5):
        started = time.perf_counter()
        joined.sum_gradients(trained, numbers, lambda: False)
        seconds.append(time.perf_counter() - started)
    kept = all(bool((p.grad == n + 0.5).all()) for n, p in enumerate(trained[:-1]) if p.grad is not None)
    good = kept and trained[-1].grad is None and numbers.tolist() == [3.0, 4.0]
    good = good and joined.meet({"a": 1}) == [{"a": 1}] and joined.send(b"file") == b"file"
    backend = torch.distributed.get_backend_config()
    joined.close()
    yield row("a group of one process", good, ms=1000 * statistics.median(seconds), backend=backend)


def optimizer_kernels(tiny: bool) -> Rows:
    """EmoSens through torch's fused kernel and through its fallback; random states there and back."""
    count = 20_000 if tiny else 40_000_000
    ends = {}
    for fused in (True, False):
        kernels.has_fused_adamw.cache_clear()
        if not fused:
            kernels.has_fused_adamw = lambda device: False  # type: ignore[assignment]
        generator = torch.Generator("cpu").manual_seed(0)
        start = torch.randn(count, generator=generator).to(CUDA)
        gradient = torch.randn(count, generator=generator).to(CUDA)
        parameter = torch.nn.Parameter(start)
        optimizer = build_optimizer("emosens", [parameter], lr=None, notify=False)
        seconds = []
        for number in range(8):
            parameter.grad = gradient * (number + 1)
            torch.cuda.synchronize()
            started = time.perf_counter()
            optimizer.observe(1.0 / (number + 1))
            optimizer.step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        ends[fused] = parameter.detach()
        yield row(f"EmoSens step, {'fused' if fused else 'fallback'}", None, ms=1000 * statistics.median(seconds))
    apart = float((ends[True] - ends[False]).abs().max())
    yield row("fused equals fallback", apart < 1e-5, apart=apart)
    tensors, document = rng.capture()
    wanted = torch.rand(9, device=CUDA).tolist()
    torch.rand(5, device=CUDA)
    rng.restore(tensors, document)
    yield row("random states of CUDA come back", torch.rand(9, device=CUDA).tolist() == wanted)


class Planned:
    """What `emotrain plan` says of a step, asked in a process of its own while something else is measured."""

    def __init__(self, preset: str, base: Path | str | None, size: int, *words: str) -> None:
        sets = [f"model={base}", "model.family=auto"] if base else []
        sets += ["train.micro_batch_size=1"]
        sets += ["network.targets=attn-mlp", "network.rank=16", f"dataset.resolution={size}", *words]
        sets += ["dataset.buckets.upscale=true", "dataset=builtin:example", "model.quantize=none"]
        command = ["plan", preset, "--json", *(word for pair in sets for word in ("--set", pair))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "emotrain", *command], stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1]
        )

    def gib(self) -> float:
        """Without what CUDA takes for itself."""
        parts = json.loads(self.process.communicate()[0])["memory_gib"]
        return float(sum(gib for name, gib in parts.items() if name != "CUDA itself"))


NEWER = {"anima": "anima", "klein-4b": "klein-4b", "z-image": "zimage", "krea2-raw": "krea2"}
WAYS = {  # checkpointed, compiled, recorded as CUDA graphs
    "eager": (False, False, False), "recorded": (False, False, True), "checkpointed": (True, False, False),
    "checkpointed, recorded": (True, False, True), "compiled": (False, True, False),
    "compiled, recorded": (False, True, True),
}  # fmt: skip


TARGETS = {  # seconds a step on an H100, by model and whether checkpointed
    ("sdxl", False): 0.25, ("sdxl", True): 0.4, ("sd15", False): 0.07, ("flux1-dev", True): 0.75,
}  # fmt: skip


def failed(what: str, error: Exception) -> dict[str, Any]:
    """A row of something that must not hide the others."""
    return row(what, False, why=f"{type(error).__name__}: {error}"[:300])


def speed(tiny: bool, variant: str, size: int, steps: int, ways: Sequence[str], base: Path | str | None) -> Rows:
    """A model with random weights: our step in each way, the bare loop's after each plain one.

    `base` is what `plan` is asked about; None: nothing is.
    """
    kind = {"flux1-dev": "flux"}.get(variant, variant)
    plans = {}
    for way in [way for way in ("eager", "checkpointed") if way in ways and base is not None]:
        plans[way] = Planned(kind, base, size, f"train.gradient_checkpointing={str(way == 'checkpointed').lower()}")
        plans[way].gib() if tiny else None
    found: dict[str, dict[str, Any]] = {}
    bare_s: dict[bool, float] = {}
    for way in ways:
        checkpointing, compiled, recorded = WAYS[way]
        plain, what = "checkpointed" if checkpointing else "eager", f"{variant} {size} px, {way}"
        clean()
        family = real_size.build(variant, torch.bfloat16, CUDA, models.change(variant, tiny))
        blocks = FAMILIES[family.name].blocks if compiled else ()
        blocks = blocks[-1:] if tiny else blocks  # of each form of a block pretend CUDA takes seconds
        try:
            trainer = Trainer(family, size, checkpointing=checkpointing, compiled=blocks, recorded=recorded)
            found[way] = trainer.measure(steps)
        except Exception as error:
            yield failed(what, error)
            del family
            continue
        good, more = found[way]["finite"], dict[str, Any]()
        if way != plain and plain in found:
            more["times_eager"] = found[plain]["s_step"] / found[way]["s_step"]
            whole = 1000 * found[way]["s_step"] + found[way]["warm_up_s"]  # seconds of a run of 1,000 steps
            more["times_eager_in_1000_steps"] = 1000 * found[plain]["s_step"] / whole
            good = good and abs(found[way]["loss"] / found[plain]["loss"] - 1) < 0.01
            good = good and found[way].get("works", True) and not found[way].get("said")
        if checkpointing in bare_s:
            more["times_bare"] = bare_s[checkpointing] / found[way]["s_step"]
        yield row(what, good, **found[way], **more)
        try:
            counted = trainer.count()
            yield row(f"{what}, a step", counted["waits"] <= 1, **counted)
        except Exception as error:
            yield failed(f"{what}, a step", error)
        del family, trainer
        if way == plain and not compiled:
            yield from beside(tiny, variant, size, steps, checkpointing, found[way]["s_step"], bare_s)
    for checkpointing, usual in bare_s.items():
        ours = min(one["s_step"] for way, one in found.items() if WAYS[way][0] == checkpointing)
        target = TARGETS.get((variant, checkpointing))
        good = tiny or (usual / ours >= 1.5 and (target is None or ours <= target))
        name = f"{variant} {size} px, {'checkpointed, ' * checkpointing}the fastest"
        yield row(name, good, s_step=ours, times_bare=usual / ours, **({"target_s": target} if target else {}))
    for way, plan in plans.items():
        if way in found:
            yield of_plan(f"{variant} {size} px, {way}, peak of plan", plan, found[way]["peak_gib"], tiny)


def beside(
    tiny: bool,
    variant: str,
    size: int,
    steps: int,
    checkpointing: bool,
    ours_s: float,
    bare_s: dict[bool, float],
) -> Rows:
    """The bare loop in the same process; its seconds a step come into `bare_s`."""
    clean()
    what = f"{variant} {size} px, {'checkpointed, ' * checkpointing}bare loop"
    try:
        family = real_size.build(variant, torch.bfloat16, CUDA, models.change(variant, tiny))
        text = real_size.text_of(family)
        usual = bare.BareLoop(family, text, size, checkpointing=checkpointing).measure(first(), steps)
    except Exception as error:
        yield failed(what, error)
        return
    bare_s[checkpointing] = usual["s_step"]
    good = usual["loss"] == usual["loss"]
    yield row(what, good, **usual, peak_gib=peak(), ours_faster=usual["s_step"] / ours_s)


def of_plan(what: str, plan: Planned, peak_gib: float, tiny: bool) -> dict[str, Any]:
    """A peak against what `plan` says."""
    try:
        said = peak_gib if tiny else plan.gib()
    except (ValueError, LookupError) as error:
        return failed(what, error)
    return row(what, 0.9 <= peak_gib / said <= 1.1, planned_gib=said, of_plan=peak_gib / said)


def recorded(tiny: bool) -> Rows:
    """SDXL as it is, the bare loop, and recorded as CUDA graphs: what is not known of speed, first."""
    yield from speed(tiny, "sdxl", 128 if tiny else 1024, 1 if tiny else 6, ("eager", "recorded")[: 2 - tiny], None)


def compiled(tiny: bool) -> Rows:
    """SDXL's blocks compiled, which may take all the time that there is. Tiny: SD 1.5's."""
    variant, size, steps = ("sd15", 64, 1) if tiny else ("sdxl", 1024, 6)
    yield from speed(tiny, variant, size, steps, ("eager", "compiled", "compiled, recorded")[: 3 - tiny], None)


def sdxl(tiny: bool) -> Rows:
    """SDXL checkpointed against the bare loop and the plan, recorded; then plain against the plan."""
    with tempfile.TemporaryDirectory() as work:
        base: Path | str = "stabilityai/stable-diffusion-xl-base-1.0"
        if tiny:
            base = Path(work) / "sdxl"
            models.write_folder(base, "sdxl", torch.bfloat16, torch.device("cpu"), models.change("sdxl", tiny))
        ways = ("eager", "checkpointed") if tiny else ("checkpointed", "checkpointed, recorded", "eager")
        yield from speed(tiny, "sdxl", 128 if tiny else 1024, 1 if tiny else 6, ways, base)


def sd15(tiny: bool) -> Rows:
    """SD 1.5: plain and recorded, against the bare loop and the plan."""
    base = None if tiny else "stable-diffusion-v1-5/stable-diffusion-v1-5"
    yield from speed(tiny, "sd15", 64 if tiny else 512, 1 if tiny else 10, ("eager", "recorded")[: 2 - tiny], base)


def newer(tiny: bool) -> Rows:
    """The newer families whole, checkpointed: peak against the plan (of the public sizes alone), waits."""
    size = 128 if tiny else 1024
    for variant, preset in NEWER.items():
        clean()
        try:
            plan = None if tiny else Planned(preset, None, size, "train.gradient_checkpointing=true")
            family = real_size.build(variant, torch.bfloat16, CUDA, models.change(variant, tiny))
            trainer = Trainer(family, size, checkpointing=True)
            found = {**trainer.measure(2), **trainer.count()}
            said = plan.gib() if plan is not None else found["peak_gib"]
        except Exception as error:
            yield failed(f"{variant} {size} px", error)
            continue
        share = found["peak_gib"] / said
        good = found["finite"] and found["waits"] <= 1 and 0.9 <= share <= 1.1
        yield row(f"{variant} {size} px, checkpointed", good, **found, planned_gib=said, of_plan=share)
        del family, trainer


def flux_kinds(tiny: bool) -> Rows:
    """FLUX.1 at its real width with few blocks, from a folder and from one file, in every kind of base."""
    size = 128 if tiny else 512
    with tempfile.TemporaryDirectory() as work:
        folder, file = Path(work) / "flux", Path(work) / "single.safetensors"
        how = models.change("flux1-dev", tiny, few_blocks=True)
        denoiser = models.write_folder(folder, "flux1-dev", torch.bfloat16, CUDA, how)
        models.write_flux_file(file, denoiser)
        del denoiser
        file.with_suffix("").symlink_to(folder)
        first: dict[Path, float] = {}
        quantize.SMALLEST = 32 if tiny else quantize.SMALLEST
        # diffusers reads single files of the public width alone; bitsandbytes' kernels are real
        bases, kinds = ([folder], ["none", "fp8"]) if tiny else ([folder, file], ["none", "fp8", "int8", "nf4"])
        for base in bases:
            for kind in kinds:
                clean()
                try:
                    family = load_family(str(base), dtype="bf16", quantize=kind, device="cuda")
                    trainer = Trainer(family, size)
                    loss = trainer.step()
                except Exception as error:
                    yield failed(f"FLUX.1 {base.name}, {kind}", error)
                    continue
                first.setdefault(base, loss)
                there = all(p.device.type == "cuda" for p in family.denoiser.parameters())
                linear = [one for one in family.denoiser.modules() if isinstance(one, torch.nn.Linear)]
                swapped, share = sum(type(one) is not torch.nn.Linear for one in linear), abs(loss / first[base] - 1)
                good = there and share < 0.05 and (swapped > 0) == (kind != "none")
                numbers = {"loss": loss, "from_bf16": share, "swapped": swapped, "all_on_cuda": there}
                yield row(f"FLUX.1 {base.name}, {kind}", good, **numbers, peak_gib=peak())
                del family, trainer
        both = list(first.values())
        if not tiny:
            yield row("folder and file are one model", len(both) == 2 and abs(both[0] / both[1] - 1) < 1e-3)


def flux(tiny: bool) -> Rows:
    """FLUX.1 whole, checkpointed: as it is, the bare loop, recorded, then with its weights at home."""
    size, steps = (128, 1) if tiny else (1024, 4)
    base = None if tiny else "black-forest-labs/FLUX.1-dev"
    loss = float("nan")
    for one in speed(tiny, "flux1-dev", size, steps, ("checkpointed", "checkpointed, recorded")[: 2 - tiny], base):
        loss = one["loss"] if one["what"].endswith("px, checkpointed") and one["ok"] else loss
        yield one
    clean()
    family = real_size.build("flux1-dev", torch.bfloat16, CUDA, models.change("flux1-dev", tiny))
    family.denoiser.cpu()
    family.memory = MemoryPlan("none", True, True, 0.0, None, "")
    trainer = Trainer(family, size, checkpointing=True)
    found = trainer.measure(steps)
    good = found["finite"] and abs(found["loss"] / loss - 1) < 1e-3
    yield row(f"flux1-dev {size} px, checkpointed, offloaded", good, **found, resident_loss=loss)
    counted = trainer.count()
    yield row(f"flux1-dev {size} px, checkpointed, offloaded, a step", counted["waits"] <= 1, **counted)


def fp16(tiny: bool) -> Rows:
    """A card without bf16: how many gradients become zero with and without the loss's scale."""
    zeros = {}
    for scaled in (True, False):
        clean()
        size = 64 if tiny else 512
        family = real_size.build("sd15", torch.float16, CUDA, models.change("sd15", tiny))
        trainer = Trainer(family, size)
        adapter: Adapter = trainer.adapter
        if not scaled:
            adapter.loss_scale = 1.0
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            for parameter in adapter.parameters():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        accumulate(trainer.parts, trainer.limits, trainer.state)
        total = sum(g.numel() for g in adapter.gradients())
        zeros[scaled] = sum(int((g == 0).sum()) for g in adapter.gradients()) / total
        adapter.drop_gradients()
        loss = trainer.step()
        yield row(f"SD 1.5 in fp16, {'scaled' if scaled else 'not scaled'}", loss == loss, zeros=zeros[scaled])
    yield row("the scale keeps gradients", zeros[True] <= zeros[False])


def capped(words: list[str]) -> None:
    """`stages.py capped GIB FILE -- emotrain's words`: a command on a card of so much memory, CUDA's own part included.

    Into the file comes what it took besides.
    """
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((float(words[0]) - CONTEXT_GIB) * GIB / total)
    code = emotrain_main(words[3:])
    Path(words[1]).write_text(json.dumps({"peak_gib": peak()}))
    sys.exit(code)


def whole_run(
    work: Path, preset: str, gib: int, sets: Sequence[str], told: int | None = None
) -> tuple[bool, dict[str, Any]]:
    """A run from its files to its LoRA and a picture within `gib` of the GPU's memory: whether it was well, numbers.

    The preset is told of a card of `told` GiB, or of as many.
    """
    words = [
        *sets, "model.dtype=bf16", f"model.memory={told or gib}gb", "dataset=builtin:example",
        "dataset.buckets.upscale=true",
        "train.max_steps=4", "save.every=2", "sample.every=4", "sample.at_start=false", "sample.steps=2",
        "validate.probe_images=1", "validate.every=4", "train.gradient_accumulation_steps=1", "stop.mode=off",
    ]  # fmt: skip
    sets = [word for pair in words for word in ("--set", pair)]
    command = ["run", preset, "--name", f"card-{gib}", "--runs-dir", str(work), "--plain", *sets]
    file = work / "peak.json"
    with subprocess.Popen(
        [sys.executable, str(HERE / "stages.py"), "capped", str(gib), str(file), "--", *command],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=work,
    ) as process:  # fmt: skip
        said = list[str]()
        for line in process.stderr or ():  # passed on: where the stage is ended, it says how far the run was
            sys.stderr.write(line)
            said = [*said[-5:], line.strip()]
    drawn = list((work / f"card-{gib}" / "samples").glob("step-*.png"))
    numbers: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if process.returncode:
        numbers["why"] = " ".join(said)
    return process.returncode == 0 and bool(drawn), numbers


def sdxl_memory(tiny: bool) -> Rows:
    """SDXL from its files to its LoRA on a small card: encode, train, validate, draw, save."""
    size = 128 if tiny else 1024
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "sdxl"
        models.write_folder(folder, "sdxl", torch.bfloat16, CUDA, models.change("sdxl", tiny), holes=True)
        sets = [f"model.base={folder}", f"dataset.resolution={size}", *(["train.loss.baseline=raw"] if tiny else [])]
        good, numbers = whole_run(Path(work), "sdxl", 8, sets)
        yield row("SDXL whole run in 8 GiB", good, **numbers)


def flux_memory(tiny: bool) -> Rows:
    """FLUX.1 whole in nf4 on a small card, its T5 with few layers; tiny in fp8, whose kernels are torch's own."""
    size, kind = (128, "fp8") if tiny else (1024, "nf4")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "flux"
        how = models.change("flux1-dev", tiny, few_encoder_layers=not tiny)
        models.write_folder(folder, "flux1-dev", torch.bfloat16, CUDA, how, holes=True)
        sets = [f"model.base={folder}", f"dataset.resolution={size}", f"model.quantize={kind}"]
        good, numbers = whole_run(Path(work), "flux", 10, sets, told=8)  # with 12 GB it would decode without tiles
        yield row(f"FLUX.1 {kind} whole run in 10 GiB", good, **numbers)


STAGES: dict[str, Callable[[bool], Rows]] = {
    "doctor": doctor, "quickstart": quickstart, "exact": exact, "kernels": optimizer_kernels, "sdxl": sdxl,
    "ranks": ranks, "sd15": sd15, "sdxl-memory": sdxl_memory, "flux-memory": flux_memory, "flux-kinds": flux_kinds,
    "flux": flux, "fp16": fp16, "newer": newer, "recorded": recorded, "compiled": compiled,
}  # fmt: skip


def main() -> None:
    """One stage."""
    name, *words = sys.argv[1:] or [""]
    if name == "capped":
        capped(words)
    if name not in STAGES:
        sys.exit(__doc__)
    assert family_of_variant("sdxl") in FAMILIES
    for found in STAGES[name]("--tiny" in words):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
