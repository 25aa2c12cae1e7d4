"""`emotrain plan`: say what a run needs before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emotrain.cli import output
from emotrain.cli.options import OneJson, Overrides, PresetName

if TYPE_CHECKING:
    from emotrain.families.memory import MemoryPlan
    from emotrain.runs.plan import Plan
    from emotrain.runs.plan_ram import RamPlan


def plan(
    preset: PresetName,
    overrides: Overrides = None,
    as_json: OneJson = False,
) -> None:
    """Say what a run needs before it starts.

    Modules, steps, memory for the largest bucket of this data set, disk, and which switch saves how
    much. What `emotrain check` refuses of preset, data and model is refused here too. No weights are
    read. Memory is counted, not measured: expect 0.9 to 1.25 times as much.
    Ends with exit code 6 if it does not fit into the free memory of this machine's GPU, or into the
    computer's own. Files that are not here count there as if stored in the dtype that the run computes
    with; others are converted while they are read, which takes their size.

    Examples:
        emotrain plan sdxl      (will it fit my card? no model or pictures needed)
        emotrain plan my.yaml --set train.micro_batch_size=4 --json
    """
    from emotrain.config.builtin import shipped_presets
    from emotrain.config.load import load
    from emotrain.errors import ResourceError
    from emotrain.runs.plan import as_dict, assume, make_plan
    from emotrain.runs.plan_ram import room
    from emotrain.runs.preflight import preflight

    loaded = load(preset, overrides or ())
    is_own = preset not in shipped_presets()
    wanted, pictures, assumed = (loaded.preset, None, ()) if is_own else assume(loaded.preset)
    with output.progress("looking at pictures") as tell:
        found = preflight(wanted, loaded.where, tell, by_size=True, pictures=pictures)
    found.raise_first()
    made = make_plan(wanted, found.found, found.pictures, found.other, assumed)
    for line in made.assumed:
        output.warning(line)
    if as_json:
        output.json_object({"schema_version": output.SCHEMA_VERSION, **as_dict(made)})
    else:
        for line in loaded.notes:
            output.note(f"note: {line}")
        _show(made)
    if made.fits is False:
        best = "close what else uses the GPU"
        if made.savings:
            best = f"`{made.savings[0][0]}` saves {_size(made.savings[0][1])}"
        raise ResourceError(
            f"about {made.needed:.1f} GiB are needed, and {made.free_gib:.1f} GiB of GPU memory are free",
            best,
        )
    if made.free_gib is not None and (tight := room(made.ram, made.free_ram)[1]) is not None:
        output.warning(tight)


def _show(made: Plan) -> None:
    from emotrain.families.table import FAMILIES
    from emotrain.runs.plan import RANGE, rounded_epochs

    work, found = made.work, made.found
    size = "x".join(map(str, work.largest.size))
    named = f", {found.variant}" if found.variant not in (found.family, "custom") else ""
    texts = f" and {made.text_modules} of the text encoders" if made.text_modules else ""
    model = f"{FAMILIES[found.family].title}{named}, {found.prediction}"
    data = f"{work.pictures} pictures and {work.held_out} held out, {work.samples} samples an epoch"
    steps = f"{work.steps_per_epoch:g} an epoch; at most {made.max_steps}"
    modules = f"{made.network} on {made.num_modules} modules{texts}"
    output.table(
        [
            ("model", f"{model}, {_millions(made.num_parameters)} parameters in {made.dtype}"),
            ("LoRA", f"{modules}, {_millions(made.num_trained)} parameters"),
            ("data", f"{data} in {work.buckets} bucket{'s' * (work.buckets != 1)}, the largest {size}"),
            *([("balance", ", ".join(share.describe() for share in work.shares))] if work.shares else []),
            ("steps", f"{steps}, which is {rounded_epochs(made)} epochs"),
        ]
    )
    output.result("")
    rows = [(name, _size(gib)) for name, gib in made.parts]
    rows.append(("in all", _size(sum(gib for _, gib in made.parts))))
    output.table(rows, header=(f"memory of a step, batch {made.batch}", ""))
    output.result("")
    output.table([(name, _size(gib)) for name, gib in made.memory.stages], header=("peak of each stage", ""))
    low, high = (made.needed * share for share in RANGE)
    output.result(f"expect {low:.1f} to {high:.1f} GiB; counted, not measured")
    which = "the trained text encoders stay" if made.text_modules else "text encoders leave when all is encoded"
    forms = "".join(f", {name} in {form}" for name, form in made.memory.encoder_forms.items())
    output.result(f"{which}; they take {_size(made.encoders_gib)}{forms}")
    output.result("")
    output.table([(name, _size(gib)) for name, gib in made.ram.stages], header=("the computer's memory", ""))
    output.result("")
    if made.savings:
        output.table([(name, _size(gib)) for name, gib in made.savings], header=("switch", "saves"))
        output.result("")
    output.table([(f"{size} GB", _verdict(memory, made.ram_by_size[size])) for size, memory in made.verdicts])
    output.result("")
    output.table([(name, _size(gib)) for name, gib in made.disk], header=("disk", ""))
    output.result("")
    output.table(_with_a_second_gpu(made))
    output.result("")
    if made.free_gib is None:
        output.result("this machine: no GPU was found, so there is nothing to compare with")
    else:
        output.result(f"this machine: {made.free_gib:.1f} GiB are free; {made.memory.sentence}")
        output.result(f"the computer's memory: {made.free_ram.free / 2**30:.1f} GiB are free")


def _size(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib * 1024:.1f} MiB"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} million" if count < 1e8 else f"{count / 1e6:,.0f} million"


def _verdict(memory: MemoryPlan, ram: RamPlan) -> str:
    means = [f"model.quantize: {memory.quantize}"] if memory.quantize != "none" else []
    means += ["gradient checkpointing"] if memory.gradient_checkpointing else []
    means += [f"{ram.locked:.1f} GiB of frozen layers in the computer's memory"] if memory.offload else []
    verdict = f"fits, {memory.needed_gib:.1f} GiB" if memory.fits else f"too small, {memory.needed_gib:.1f} GiB"
    return f"{verdict}, with {' and '.join(means)}" if means else verdict


def _with_a_second_gpu(made: Plan) -> list[tuple[str, str]]:
    from emotrain.runs.plan import second_gpu

    second = second_gpu(made)
    times = " or ".join(f"{seconds * 1000:,.0f} ms over {name}" for name, seconds in second.exchange_s.items())
    return [
        (
            "a second GPU",
            f"`--gpus 2`: {second.samples} pictures a step, {second.steps_per_epoch:g} steps an epoch",
        ),
        ("", f"a step takes as long as on one, and {times} for the exchange"),
        ("", f"as much memory on each, and {_size(second.more_gib)}"),
        ("", f"{_size(made.ram.needed(2))} of the computer's memory in place of {_size(made.ram.needed())}"),
    ]
