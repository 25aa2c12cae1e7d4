"""`emotrain init`: every proposal, with the reason that is said for it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from emotrain.cli.app import main
from emotrain.config.builtin import shipped_presets
from emotrain.config.load import load_preset
from emotrain.families.memory import MemoryPlan
from emotrain.families.registry import FAMILIES
from emotrain.families.table import sniff
from emotrain.runs import card, propose

pytestmark = pytest.mark.usefixtures("counted_once")


def pictures(folder: Path, captions: list[str], side: int = 1024) -> Path:
    folder.mkdir(parents=True)
    for i, caption in enumerate(captions):
        Image.new("RGB", (side, side), (40 * i % 255, 80, 120)).save(folder / f"{i}.png")
        if caption:
            (folder / f"{i}.txt").write_text(caption, encoding="utf-8")
    return folder


def wrote(capsys: Any, *arguments: str) -> tuple[dict[str, Any], str, Path]:
    """The preset, what was said, and the file."""
    assert main(["init", *arguments]) == 0
    streams = capsys.readouterr()
    path = Path(streams.out.strip())
    preset = yaml.safe_load(path.read_text(encoding="utf-8"))  # noqa: TID251  what any YAML reader sees
    return preset, streams.err, path


TAGS = [f"mika_ch, 1girl, solo, {colour} hair, smile" for colour in ("red", "blue", "green", "black")]
SENTENCES = ["zorb, a red lamp on a table", "zorb, a blue lamp", "zorb, a green lamp that stands near an open window"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_trigger_is_the_word_that_captions_begin_with(capsys: Any, here: Path) -> None:
    preset, said, path = wrote(capsys, str(pictures(here / "mika", TAGS)))
    assert path == Path("mika.yaml")
    assert preset["dataset"]["trigger"] == "mika_ch"
    assert "which 4 of 4 captions begin with" in said
    assert preset["dataset"]["folders"] == [{"path": "./mika"}]


@pytest.mark.parametrize(
    "captions", [["a cat", "a dog", "a bird"], ["1girl, solo, red, x", "1girl, solo, blue, y"], [""]]
)
def test_without_one_it_is_made_of_the_folder(captions: list[str], capsys: Any, here: Path) -> None:
    preset, said, _ = wrote(capsys, str(pictures(here / "My Cats", captions)))
    assert preset["dataset"]["trigger"] == "my_cats"
    assert "after the folder" in said


def test_a_year_in_the_folders_name_is_no_count(capsys: Any, here: Path) -> None:
    preset, said, _ = wrote(capsys, str(pictures(here / "2024_trip", ["a cat", "the dog", "one bird"])))
    assert preset["dataset"]["trigger"] == "2024_trip"
    assert "asks for" not in said


def test_a_made_up_tag_in_another_place_is_found_too(capsys: Any, here: Path) -> None:
    captions = [f"1girl, solo, mika_ch, {colour} hair" for colour in ("red", "blue", "green")]
    preset, said, _ = wrote(capsys, str(pictures(here / "data", captions)))
    assert preset["dataset"]["trigger"] == "mika_ch"
    assert "3 of 3 captions have as a tag" in said


def test_an_ordinary_first_word_is_no_trigger(capsys: Any, here: Path) -> None:
    captions = ["portrait of a cat", "portrait of a dog", "portrait of a bird"]
    preset, _, _ = wrote(capsys, str(pictures(here / "pets", captions)))
    assert preset["dataset"]["trigger"] == "pets"


def test_nothing_is_written_through_a_dangling_link(capsys: Any, here: Path) -> None:
    folder = pictures(here / "data", SENTENCES)
    (here / "data.yaml").symlink_to(here / "elsewhere.yaml")
    assert main(["init", str(folder)]) == 2
    assert not (here / "elsewhere.yaml").exists()


def test_a_folder_of_kohyas_has_repeats_in_its_name_and_no_trigger_of_that_name(capsys: Any, here: Path) -> None:
    preset, said, path = wrote(capsys, str(pictures(here / "10_mika woman", ["a cat", "the dog", "one bird"])))
    assert path == Path("mika.yaml")
    assert preset["dataset"]["trigger"] == "mika"
    assert "asks for 10" in said
    assert "repeats" not in preset["dataset"]["folders"][0]


def test_the_one_subject_within_a_folder_of_kohyas_is_the_trigger(capsys: Any, here: Path) -> None:
    pictures(here / "img" / "10_mika woman", ["a cat", "the dog", "one bird"])
    preset, said, path = wrote(capsys, str(here / "img"))
    assert (path, preset["dataset"]["trigger"]) == (Path("mika.yaml"), "mika")
    assert "10_mika woman: 10" in said
    pictures(here / "img" / "5_outfit", ["a hat", "the coat", "one shoe"])
    preset, _, path = wrote(capsys, str(here / "img"))
    assert (path, preset["dataset"]["trigger"]) == (Path("img.yaml"), "img")


@pytest.mark.parametrize(("captions", "shuffled"), [(TAGS, True), (SENTENCES, False)])
def test_tags_are_shuffled_and_sentences_are_not(captions: list[str], shuffled: bool, capsys: Any, here: Path) -> None:
    preset, said, _ = wrote(capsys, str(pictures(here / "data", captions)))
    assert preset["dataset"].get("captions", {}).get("shuffle", False) is shuffled
    assert ("lists of tags" in said) is shuffled


@pytest.mark.parametrize(("side", "wanted"), [(1024, None), (700, 640), (300, 512)])
def test_small_pictures_get_a_smaller_resolution(side: int, wanted: int | None, capsys: Any, here: Path) -> None:
    preset, said, _ = wrote(capsys, str(pictures(here / "data", SENTENCES, side)))
    assert preset["dataset"].get("resolution") == wanted
    assert ("half of the pictures" in said) is (wanted is not None)


def test_prompts_come_from_the_longest_middle_and_shortest_caption(capsys: Any, here: Path) -> None:
    preset, _, _ = wrote(capsys, str(pictures(here / "data", SENTENCES)))
    assert preset["sample"]["prompts"] == [
        "[trigger], a green lamp that stands near an open window",
        "[trigger], a red lamp on a table",
        "[trigger], a blue lamp",
    ]


def test_the_model_chooses_the_preset_and_the_result_can_be_checked(capsys: Any, here: Path) -> None:
    folder = pictures(here / "data", SENTENCES * 2, side=64)
    preset, said, path = wrote(capsys, str(folder), "builtin:tiny-sd", "-o", "mine.yaml")
    assert preset["extends"] == "sd15"
    assert preset["model"] == "builtin:tiny-sd"
    assert preset["dataset"]["resolution"] == 64
    assert re.search(r"next: emotrain check mine\.yaml, then emotrain run mine\.yaml", said)
    assert main(["check", str(path)]) == 0


@pytest.mark.parametrize(("prediction", "by_tags"), [("epsilon", "illustrious"), ("v_prediction", "noobai-vpred")])
def test_captions_of_tags_choose_the_preset_of_a_model_that_learned_from_tags(prediction: str, by_tags: str) -> None:
    found = SimpleNamespace(family="sdxl", variant="sdxl", prediction=prediction, distilled=False)
    assert propose.family_preset(found, tags=True) == by_tags
    assert propose.family_preset(found, tags=False) == "sdxl"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_of_every_family_stands_on_a_preset_of_its_own(family: str) -> None:
    variants = FAMILIES[family].variants
    for variant in (*variants, "custom"):
        found = SimpleNamespace(family=family, variant=variant, prediction="flow", distilled=False)
        name = propose.family_preset(found, tags=False)
        assert name in shipped_presets() or family == "sd21"
        preset = load_preset(name) if name else None
        assert preset is None or preset.model.family in ("auto", family)
        assert name == variant or variant not in shipped_presets()


def test_a_distilled_model_has_its_own_preset_and_a_warning(
    capsys: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(family="zimage", variant="z-image", prediction="flow", distilled=True)
    assert propose.family_preset(found, tags=False) == "zimage-turbo"
    found.distilled = False
    assert propose.family_preset(found, tags=False) == "zimage"
    folder = pictures(here / "data", SENTENCES)
    _, said, _ = wrote(capsys, str(folder), "builtin:tiny-sd", "-o", "one.yaml")
    assert "distilled" not in said
    monkeypatch.setattr(propose, "sniff", lambda model: replace(sniff(model), distilled=True))
    _, said, _ = wrote(capsys, str(folder), "builtin:tiny-sd", "-o", "two.yaml")
    assert "tiny-sd is distilled to few steps" in said


def test_without_a_model_it_says_so(capsys: Any, here: Path) -> None:
    preset, said, _ = wrote(capsys, str(pictures(here / "data", SENTENCES)))
    assert preset["extends"] == "sdxl"
    assert "no model was named" in said


def test_nothing_is_written_over_and_the_next_name_is_offered(capsys: Any, here: Path) -> None:
    folder = pictures(here / "data", SENTENCES)
    (here / "data.yaml").write_text("mine")
    assert main(["init", str(folder)]) == 5
    assert "-o data-2.yaml" in capsys.readouterr().err
    assert (here / "data.yaml").read_text() == "mine"


def test_hostile_words_stay_words(capsys: Any, here: Path) -> None:
    captions = ['no, "quoted": yes # not a comment', "no, {a: [b", "no, &anchor *alias"]
    preset, _, _ = wrote(capsys, str(pictures(here / "no", captions)))
    assert preset["dataset"]["trigger"] == "no"
    assert '[trigger], "quoted": yes # not a comment' in preset["sample"]["prompts"]


@pytest.mark.parametrize(("make", "code"), [("missing", 3), ("empty", 3), ("file", 3)])
def test_a_folder_without_pictures_is_one_line(make: str, code: int, capsys: Any, here: Path) -> None:
    target = here / "data"
    if make == "empty":
        target.mkdir()
    elif make == "file":
        target.write_text("x")
    assert main(["init", str(target)]) == code
    assert capsys.readouterr().err.count("error:") == 1
    assert not list(here.glob("*.yaml"))


def test_a_missing_model_is_exit_4(capsys: Any, here: Path) -> None:
    assert main(["init", str(pictures(here / "data", SENTENCES)), "./none.safetensors"]) == 4
    assert "does not exist" in capsys.readouterr().err


def test_subfolders_of_unequal_size_are_balanced(capsys: Any, here: Path) -> None:
    pictures(here / "data" / "mika", SENTENCES * 2)
    pictures(here / "data" / "car", SENTENCES)
    preset, said, path = wrote(capsys, "data", "builtin:tiny-sd")
    assert preset["dataset"]["folders"] == [{"path": "./data/car"}, {"path": "./data/mika"}]
    assert preset["dataset"]["balance"] == "equal"
    assert "dataset.balance: equal, since there are 3 in car, 6 in mika" in said
    assert main(["check", str(path)]) == 0
    assert "car 50 % (3 pictures x 2)" in capsys.readouterr().out


def test_subfolders_of_equal_size_need_no_balance(capsys: Any, here: Path) -> None:
    pictures(here / "data" / "mika", SENTENCES)
    pictures(here / "data" / "car", SENTENCES[:2])
    pictures(here / "data" / "reg", SENTENCES)
    shutil.rmtree(here / "data" / "car")
    preset, said, _ = wrote(capsys, "data")
    assert preset["dataset"]["folders"] == [{"path": "./data/mika"}, {"path": "./data/reg", "prior": 1.0}]
    assert "balance" not in preset["dataset"]
    assert "prior: reg holds regularisation pictures, by its name" in said


def test_kohyas_subfolders_keep_the_repeats_of_their_names(capsys: Any, here: Path) -> None:
    pictures(here / "data" / "10_mika woman", SENTENCES)
    pictures(here / "data" / "2_car", SENTENCES)
    preset, said, _ = wrote(capsys, "data")
    assert preset["dataset"]["folders"] == [{"path": "./data"}]
    assert "repeats: those in the subfolders' names (10_mika woman: 10, 2_car: 2)" in said


def test_pictures_beside_subfolders_are_one_folder(capsys: Any, here: Path) -> None:
    pictures(here / "data", SENTENCES)
    pictures(here / "data" / "more", SENTENCES * 3)
    preset, _, _ = wrote(capsys, "data")
    assert preset["dataset"]["folders"] == [{"path": "./data"}]


@pytest.mark.parametrize("place", ["data/masks", "data_masks", "masks", "data-mask"])
def test_masks_are_found_inside_and_beside_the_folder(place: str, capsys: Any, here: Path) -> None:
    pictures(here / "data", SENTENCES)
    pictures(here / place, ["", ""])
    preset, said, path = wrote(capsys, "data", "builtin:tiny-sd")
    assert preset["dataset"]["folders"] == [{"path": "./data", "mask": f"./{place}"}]
    assert f"mask: {place}, which has one for 2 of 3 pictures" in said
    assert main(["check", str(path)]) == 0


def test_a_folder_called_masks_without_masks_is_none(capsys: Any, here: Path) -> None:
    pictures(here / "data", SENTENCES)
    pictures(here / "masks", [""] * 9)
    preset, _, _ = wrote(capsys, "data")
    assert preset["dataset"]["folders"] == [{"path": "./data"}]


def planned(
    free: float | None, needs: dict[str, tuple[float, bool]], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, str]:
    """The proposal for a card with so much memory free, where a plan needs (GiB, offload) by its quantisation."""

    def make_plan(preset: Any) -> Any:
        kind = preset.model.quantize
        needed, offload = needs[kind]
        memory = MemoryPlan(kind, True, offload, needed, free, f"memory: {kind}; about {needed} GiB of {free} GiB")
        large = tuple((size, replace(memory, budget_gib=float(size))) for size in (8, 12, 16, 24))
        saving = (("model.quantize: nf4", 3.0),)
        return SimpleNamespace(free_gib=free, memory=memory, verdicts=large, savings=saving)

    monkeypatch.setattr(card, "make_plan", make_plan)
    monkeypatch.setattr(card, "choose_device", lambda _: "cuda")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Some Card")
    return card.memory_proposal(load_preset("quickstart"))


def test_what_the_card_means_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize, why = planned(None, {"none": (10.5, False)}, monkeypatch)
    assert (quantize, why) == (
        None,
        "memory: no GPU was found here; by the numbers of `emotrain plan`, cards of 12 GB and more can train it",
    )
    _, why = planned(None, {"none": (40.0, False)}, monkeypatch)
    assert why.endswith("no card of up to 24 GB can train it")
    quantize, why = planned(22.0, {"none": (10.5, False)}, monkeypatch)
    assert quantize is None
    assert (
        why
        == "memory: 22.0 GiB are free on Some Card; the run will choose at its start: none; about 10.5 GiB of 22.0 GiB"
    )


@pytest.mark.parametrize("without", [(7.0, True), (10.5, False)])
def test_fp8_is_proposed_where_the_base_does_not_stay_on_the_card(
    without: tuple[float, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize, why = planned(7.5, {"none": without, "fp8": (6.0, False)}, monkeypatch)
    assert quantize == "fp8"
    assert why == "model.quantize: fp8, since 7.5 GiB are free on Some Card: fp8; about 6.0 GiB of 7.5 GiB"


def test_a_card_that_is_too_small_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize, why = planned(4.0, {"none": (10.5, True), "fp8": (6.0, False)}, monkeypatch)
    assert quantize is None
    assert "4.0 GiB are free on Some Card, which is not enough: none; about 10.5 GiB of 4.0 GiB" in why
    assert "`model.quantize: nf4` saves most; close what else uses the card" in why


def test_the_cards_proposal_is_in_the_preset(capsys: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "memory_proposal", lambda preset: ("fp8", f"because of {Path(preset.model.base).name}"))
    preset, said, path = wrote(capsys, str(pictures(here / "data", SENTENCES, side=64)), "builtin:tiny-sd")
    assert preset["model"] == {"base": "builtin:tiny-sd", "quantize": "fp8"}
    assert "because of builtin:tiny-sd" in said
    assert main(["check", str(path)]) == 0


def test_a_run_on_this_machine_is_planned_before_the_preset_is_written(capsys: Any, here: Path) -> None:
    _, said, _ = wrote(capsys, str(pictures(here / "data", SENTENCES, side=64)), "builtin:tiny-sd")
    assert re.search(
        r"memory: (no GPU was found here; by the numbers of `emotrain plan`, cards of 8 GB|.* are free on)", said
    )
