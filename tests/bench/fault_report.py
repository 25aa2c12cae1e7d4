"""What was once found wrong, tried again: one line for each entry, A1 to E7.

    python tests/bench/fault_report.py [--only A9]... [--out FILE]

Each entry makes its own small input in an empty folder and calls the command line in this process; entries that need
minutes or a look inside are tests, run by their names. Prints a table: entry, command, exit code, first line, and
whether it is as wanted; the exit code is 1 where one is not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", NO_COLOR="1", TOKENIZERS_PARALLELISM="false")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "families")]

import hostile  # noqa: E402
from PIL import Image  # noqa: E402

HOME = Path(__file__).parents[2]
QUICK = "train.max_steps=2 sample.every=0 sample.at_start=false validate.probe_images=1 stop.mode=off save.every=1"
PRESET = """
model: {model}
dataset: {{folders: [{folder}], resolution: 64, buckets: {{step: 8, min: 64, max: 64}}{data}}}
network: {{rank: 2, targets: attn}}
train: {{max_steps: 2}}
sample: {{every: 0, at_start: false}}
validate: {{probe_images: 1}}
save: {{every: 1}}
{more}
"""


@dataclass(frozen=True)
class Done:
    """What a command did."""

    command: str
    code: int
    text: str

    @property
    def first(self) -> str:
        """Its error, else its warning, else its first line."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        telling = [line for word in ("error", "warning") for line in lines if line.startswith(word)]
        return (telling or lines or [""])[0]


Answer = tuple[Done, bool]
ENTRIES: dict[str, tuple[str, Callable[[], Answer]]] = {}


def entry(name: str, what: str) -> Callable[[Callable[[], Answer]], Callable[[], Answer]]:
    """Register an entry; it runs in an empty folder and gives a command's doing and whether it is as wanted."""

    def add(function: Callable[[], Answer]) -> Callable[[], Answer]:
        ENTRIES[name] = (what, function)
        return function

    return add


def emotrain(*words: str) -> Done:
    from emotrain.cli.app import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = int(main(list(words)))
    return Done("emotrain " + " ".join(words), code, text.getvalue())


def tested(*nodes: str) -> Answer:
    """Tests in a process of their own."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *(f"{HOME}/tests/{n}" for n in nodes),
    ]
    done = subprocess.run(words, cwd=HOME, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    return Done(f"pytest {' '.join(nodes)}", done.returncode, lines[-1]), done.returncode == 0


def wanted(done: Done, code: int, *words: str) -> Answer:
    return done, done.code == code and all(word in done.text for word in words)


def preset(
    name: str = "p", *, model: str = "builtin:tiny-sd", folder: str = "{path: ./pics}", data: str = "", more: str = ""
) -> str:
    Path(f"{name}.yaml").write_text(PRESET.format(model=model, folder=folder, data=data, more=more), encoding="utf-8")
    return f"{name}.yaml"


def pics(folder: str = "pics", count: int = 3) -> Path:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.effect_noise((72, 64), 60 + index).convert("RGB").save(path / f"{index}.png")
        (path / f"{index}.txt").write_text(f"a square, number {index}", encoding="utf-8")
    return path


def model_copy() -> Path:
    shutil.copytree(hostile.ASSETS / "tiny-sd", "m")
    return Path("m")


def header(path: str, shapes: dict[str, list[int]]) -> str:
    """A .safetensors file of these shapes, its weights a hole in the disk."""
    entries, at = {}, 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return f"./{path}"


# ------------------------------------------------------------ A. wrong results without a word


@entry("A1", "FLUX.1's shift at real sizes")
def a1() -> Answer:
    return tested("families/test_timesteps_at_real_sizes.py")


@entry("A2", "learning_rate: 1e-4 with an emo optimizer")
def a2() -> Answer:
    pics()
    return wanted(emotrain("check", preset(more="learning_rate: 1e-4")), 2, "lr")


@entry("A3", "a text encoder with a tensor missing")
def a3() -> Answer:
    from safetensors.torch import load_file, save_file

    pics()
    path = model_copy() / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[3])
    save_file(tensors, path)
    return wanted(emotrain("run", preset(model="./m"), "--plain"), 4, "text_encoder")


@entry("A3b", "scaled fp8")
def a3b() -> Answer:
    return tested("families/test_single_file.py", "families/test_single_file_flow.py")


@entry("A4", "Chroma called FLUX.1")
def a4() -> Answer:
    pics()
    shapes = {f"double_blocks.{n}.img_attn.qkv.weight": [9216, 3072] for n in range(19)}
    shapes |= {f"single_blocks.{n}.linear1.weight": [21504, 3072] for n in range(38)}
    file = header("chroma.safetensors", {**shapes, "img_in.weight": [3072, 64],
                                         "distilled_guidance_layer.in_proj.weight": [5120, 64],
                                         "nerf_blocks.0.weight": [64, 64]})  # fmt: skip
    return wanted(emotrain("check", preset(model=file)), 4, "Chroma Radiance")


@entry("A5", "model.prediction insists")
def a5() -> Answer:
    pics()
    return wanted(emotrain("check", preset(model="{base: builtin:tiny-sd, prediction: v}")), 0, "v_prediction")


@entry("A6", "masks that are black, and masks that are the pictures")
def a6() -> Answer:
    pics()
    Path("masks").mkdir()
    Image.new("L", (72, 64), 0).save("masks/0.png")
    one = emotrain("check", preset(folder="{path: ./pics, mask: ./masks}"))
    other = emotrain("check", preset(folder="{path: ./pics, mask: ./pics}"))
    return one, one.code == 3 and "black all over" in one.text and other.code == 3 and "mask" in other.first


@entry("A7", "a run folder inside the data")
def a7() -> Answer:
    pics()
    pics("pics/runs/x/samples")
    Path("pics/runs/x/run.json").write_text("{}", encoding="utf-8")
    done = emotrain("check", preset())
    return done, done.code == 0 and "3 pictures" in done.text


@entry("A8", "captions of several lines")
def a8() -> Answer:
    pics()
    Path("pics/0.txt").write_text("one sentence.\ntwo sentences.\nthree.", encoding="utf-8")
    return wanted(emotrain("lint", "pics"), 0, "caption-lines")


@entry("A9", "sample prompts from a file; kohya's flags; tags without a space")
def a9() -> Answer:
    from emotrain.dataset.captions import split_tags

    pics()
    Path("prompts.txt").write_text("a cat\na dog --w 64 --h 64\n", encoding="utf-8")
    preset()
    Path("q.yaml").write_text("extends: p.yaml\nsample: {prompts: prompts.txt}\n", encoding="utf-8")
    done = emotrain("check", "q.yaml", "--json")
    drawn = json.loads(done.text)["preset"]["sample"]["prompts"] if done.code == 0 else []
    return done, len(drawn) == 2 and split_tags("score_9,1girl") == ("score_9", "1girl")


@entry("A10", "names in NFD and NFC, a.png.txt")
def a10() -> Answer:
    pics(count=2)
    for index, (old, new) in enumerate((("caf\u00e9", "cafe\u0301"), ("b", "b"))):
        Path(f"pics/{index}.png").rename(f"pics/{new}.png")
        caption = f"{unicodedata.normalize('NFC', old)}.txt" if index == 0 else f"{old}.png.txt"
        Path(f"pics/{index}.txt").rename(f"pics/{caption}")
    done = emotrain("lint", "pics")
    return done, "caption-missing" not in done.text and "orphan" not in done.text


@entry("A11", "continue sets the network, and says so")
def a11() -> Answer:
    import torch
    from safetensors.torch import save_file

    pics()
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    halves = {f"{stem}.lora_down.weight": torch.ones(2, 96), f"{stem}.lora_up.weight": torch.zeros(96, 2)}
    save_file({**halves, f"{stem}.alpha": torch.tensor(2.0)}, "x.safetensors", {"ss_base_model_version": "sd_v1"})
    return wanted(emotrain("check", preset(more="start_from: {continue: ./x.safetensors}")), 0, "continues", "rank 2")


@entry("A12", "lint FOLDER names the size it assumed")
def a12() -> Answer:
    pics()
    return wanted(emotrain("lint", "pics"), 0, "held against 512 px", "too small for 512")


@entry("A13", "a run that crashed shows its steps; losses of other validations stay apart")
def a13() -> Answer:
    from emotrain.runs.folder import RunFolder, create_run

    for name in ("a", "b"):
        create_run(Path("runs"), name, {"name": name})
        Path(f"runs/{name}/metrics.jsonl").write_text('{"step": 7, "loss": 0.1}\n', encoding="utf-8")
        RunFolder(Path(f"runs/{name}")).update_info(held_out=[name], best_loss=0.123)
    done, compared = emotrain("runs", "list"), emotrain("runs", "compare", "a", "b")
    return done, " 7 " in done.text and "crashed" in done.text and "0.123" not in compared.text


@entry("A14", "resume with another scheduler")
def a14() -> Answer:
    pics()
    path = model_copy() / "scheduler" / "scheduler_config.json"
    emotrain("run", preset(model="./m"), "--plain")
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.02}), encoding="utf-8")
    return wanted(emotrain("resume", "p", "--plain", "--set", "train.max_steps=3"), 5, "scheduler")


# ------------------------------------------------------------ B, C. check is the whole truth; hints


@entry("B1", "what run refuses, check refuses")
def b1() -> Answer:
    return tested("runs/test_check_is_the_whole_truth.py")


@entry("B2", "resume of a finished run refuses at once")
def b2() -> Answer:
    return tested("runs/test_runs_that_end_badly.py::test_a_finished_run_is_refused_at_once")


@entry("C", "words of others get hints that mean the right thing")
def c1() -> Answer:
    pics()
    wrong = []
    for words, hint in {
        "caption_ext: .txt": "captions.extension", "output_dir: x": "runs-dir",
        "is_reg: true": "prior", "xformers: true": "xformers", "seed: -1": "seed", "negative_prompt: bad": "--n",
    }.items():  # fmt: skip
        done = emotrain("check", preset(more=words))
        if done.code != 2 or hint not in done.text:
            wrong.append(f"{words} -> {done.code} {done.first}")
    return Done("emotrain check WORD.yaml", done.code, "; ".join(wrong) or done.first), not wrong


# ------------------------------------------------------------ D. hostile input


@entry("D1", "a model folder with code in it")
def d1() -> Answer:
    pics()
    index = model_copy() / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "tokenizer": ["transformers", "AutoTokenizer"]}))
    config = Path("m/tokenizer/tokenizer_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoTokenizer": ["x.Bad", None]}}))
    Path("m/tokenizer/x.py").write_text("open('ran', 'w')\nclass Bad: pass\n", encoding="utf-8")
    done = emotrain("run", preset(model="./m"), "--plain")
    return done, done.code in (0, 4) and not Path("ran").exists() and "[y/N]" not in done.text


@entry("D2", "spoiled inputs of all kinds")
def d2() -> Answer:
    return tested("test_hostile_sweep.py")


@entry("D3", "a pipe in place of a weight file")
def d3() -> Answer:
    pics()
    os.mkfifo("x.safetensors")
    return wanted(emotrain("check", preset(model="./x.safetensors")), 4)


@entry("D4", "captions and pictures that take forever")
def d4() -> Answer:
    pics()
    Path("pics/0.txt").write_text("{" + "|" * 60_000, encoding="utf-8")
    Path("pics/1.txt").write_text("mika " * 7000, encoding="utf-8")
    Path("pics/2.txt").write_text("w" * 32_000 + " " * 30_000 + "b", encoding="utf-8")
    Path("pics/3.jpg").write_bytes(hostile.many_scans(1000, 800))
    start = time.process_time()
    done = emotrain("check", preset(data=", trigger: mika"))
    return done, done.code == 3 and "passes" in done.text and time.process_time() - start < 10


@entry("D5", "links in a run folder")
def d5() -> Answer:
    pics()
    emotrain("run", preset(), "--plain")
    Path("mine").write_text("mine", encoding="utf-8")
    Path("runs/p/metrics.jsonl").unlink()
    Path("runs/p/metrics.jsonl").symlink_to("../../mine")
    done = emotrain("resume", "p", "--plain", "--set", "train.max_steps=3")
    return done, done.code == 5 and Path("mine").read_text() == "mine"


@entry("D6", "one bad run and the list of all")
def d6() -> Answer:
    from emotrain.runs.folder import create_run

    for name in ("good", "bad"):
        create_run(Path("runs"), name, {"name": name})
    Path("runs/bad/run.json").write_text('{"started": 5, "parents": 7}', encoding="utf-8")
    Path("runs/bad/.lock").write_text("[1]", encoding="utf-8")
    return wanted(emotrain("runs", "list"), 0, "good", "damaged")


@entry("D7", "closed and full streams")
def d7() -> Answer:
    words = f"{sys.executable} -m emotrain presets list"
    codes = [
        subprocess.run(f"{words} {streams}", shell=True, capture_output=True, text=True, cwd=HOME)
        for streams in (">&-", "2>&-", ">/dev/full")
    ]
    text = " ".join(str(one.returncode) for one in codes)
    clean = all("Traceback" not in one.stderr and one.returncode != 1 for one in codes)
    return Done("emotrain presets list >&- | 2>&- | >/dev/full", max(one.returncode for one in codes), text), clean


@entry("D8", "names that no file can have, digits that are none, absurd numbers")
def d8() -> Answer:
    pics()
    done = emotrain("check", preset(), "--name", "x" * 300)
    others = [
        emotrain("check", "p.yaml", "--set", f"{key}={value}")
        for key, value in (
            ("dataset.folders.²", "x"), ("network.rank", "1" * 5000), ("model.vae", "~nouser/x"),
            ("train.gradient_accumulation_steps", "1" + "0" * 12), ("sample.steps", "2000"),
            ("network.targets", r"['(\w+\.?)+x']"), ("train.loss.min_snr_gamma", "1e30"),
        )
    ]  # fmt: skip
    return done, all(one.code in (2, 4) for one in (done, *others))


@entry("D9", "runs that end badly hand over their best")
def d9() -> Answer:
    return tested("runs/test_runs_that_end_badly.py", "runs/test_logs_on_disk.py")


@entry("D10", "a final LoRA that cannot be written; a bug's traceback")
def d10() -> Answer:
    file = "test_hostile_files.py"
    return tested(
        f"{file}::test_a_lora_that_cannot_be_written_at_the_end_is_exit_6",
        f"{file}::test_what_a_bug_raises_in_a_run_leaves_its_traceback_in_the_run_s_folder",
    )


# ------------------------------------------------------------ E. what irritated


@entry("E1", "guides for installing and trouble, reached from the index")
def e1() -> Answer:
    index, readme = (HOME / "docs" / "index.md").read_text("utf-8"), (HOME / "README.md").read_text("utf-8")
    lacking = [name for name in ("install", "troubleshooting", "data-set", "lora-files") if f"{name}.md" not in index]
    return Done("docs/index.md", 0, f"lacking: {lacking}"), not lacking and "docs/index.md" in readme


@entry("E2", "the sheet's last column is the LoRA that is handed over")
def e2() -> Answer:
    return tested("runs/test_whole_run.py::test_the_sheets_last_column_is_drawn_from_the_file",
                  "observers/test_observers_sheet.py")  # fmt: skip


@entry("E3", "images says that nothing stands out")
def e3() -> Answer:
    folder = hostile.good_run(Path("runs"), "a")
    return wanted(emotrain("images", str(folder)), 0, "nothing stands out among 5 pictures")


@entry("E4", "a taken name offers the next; names of runs where a file is asked for")
def e4() -> Answer:
    pics()
    hostile.good_run(Path("runs"), "p")
    done = emotrain("check", preset())
    return done, done.code == 5 and "`--name p-2` is free" in done.text and emotrain("lora", "inspect", "p").code == 0


@entry("E5", "plan a public model without a file of it")
def e5() -> Answer:
    return wanted(emotrain("plan", "sdxl"), 0)


@entry("E6", "the dashboard says what the stop waits for")
def e6() -> Answer:
    return tested("observers/test_observers_dashboard.py")


@entry("E7", "own pictures on the quickstart; data that moved")
def e7() -> Answer:
    pics()
    Path("own.yaml").write_text("extends: quickstart\ndataset: ./pics\nname: own\n", encoding="utf-8")
    done = emotrain("check", "own.yaml", "--json")
    emotrain("run", preset(), "--plain")
    Path("other").mkdir()
    Path("pics").rename("other/pics")
    words = ("--set", "dataset.folders.0.path=other/pics", "--set", "train.max_steps=3")
    resumed = emotrain("resume", "p", "--plain", *words)
    return done, done.code == 0 and "inkmoji" not in done.text and resumed.code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(ENTRIES))
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    lines = ["| entry | what | command | exit | first line | as wanted |", "|---" * 6 + "|"]
    held, start = True, Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        tempfile.tempdir = name
        os.environ["EMOTRAIN_CACHE"] = f"{name}/cache"
        hostile.SHELF = Path(name)
        hostile.LORAS.update(hostile.lora_files())
        for key in options.only or ENTRIES:
            what, function = ENTRIES[key]
            here = Path(name) / key
            here.mkdir()
            with contextlib.chdir(here):
                done, right = function()
            held &= right
            shown = [" ".join(text.split()).replace("|", "/")[:110] for text in (done.command, done.first)]
            lines.append(f"| {key} | {what} | `{shown[0]}` | {done.code} | {shown[1]} | {'yes' if right else 'NO'} |")
            print(lines[-1].replace(str(here), "."), flush=True)
    if options.out:
        (start / options.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(not held)


if __name__ == "__main__":
    raise SystemExit(main())
