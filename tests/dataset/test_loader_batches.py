"""Batches are a pure function of (seed, micro-step), and no picture is left behind."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emotrain.batch import Batch
from emotrain.dataset.buckets import BucketRules, assign
from emotrain.dataset.cache import Cache
from emotrain.dataset.encode import prepare
from emotrain.dataset.loader import CachedDataset
from emotrain.dataset.scan import FolderSpec, scan
from emotrain.dataset.settings import LoaderSettings
from emotrain.dataset.split import example_digests, fingerprint, split_held_out, take_shard
from emotrain.errors import ConfigError, DatasetError

SETTINGS = LoaderSettings(BucketRules((64,), 8), micro_batch_size=3, seed=11, shuffle=True, dropout=0.2)
SIZES = [(64, 64)] * 5 + [(96, 64)] * 4 + [(64, 96)] * 2


@pytest.fixture
def found(tmp_path: Path, make: Any) -> Any:
    for index, size in enumerate(SIZES):
        (tmp_path / "own").mkdir(exist_ok=True)
        make.noise(*size, seed=index).save(tmp_path / "own" / f"p{index:02}.png")
        (tmp_path / "own" / f"p{index:02}.txt").write_text(f"p{index}, a, b, c")
    (tmp_path / "girls").mkdir()
    make.noise(64, 64, seed=99).save(tmp_path / "girls" / "g.png")
    specs = [
        FolderSpec(path=str(tmp_path / "own"), repeats=2, flip=True),
        FolderSpec(path=str(tmp_path / "girls"), prior=0.5),
    ]
    return scan(specs).examples


@pytest.fixture
def data(found: Any, tiny_family: Any, tmp_path: Path) -> CachedDataset:
    return prepare(tiny_family, found, SETTINGS, Cache(tmp_path / "cache"))


def same(one: Batch, other: Batch) -> bool:
    return (
        one.ids == other.ids
        and one.texts == other.texts
        and torch.equal(one.latents, other.latents)
        and all(torch.equal(one.text[name], other.text[name]) for name in one.text)
        and torch.equal(one.conditioning.crop_top_lefts, other.conditioning.crop_top_lefts)
    )


def epoch_of(data: CachedDataset, epoch: int) -> list[Batch]:
    first = epoch * data.batches_per_epoch
    return [data.batch(first + i) for i in range(data.batches_per_epoch)]


def test_a_batch_depends_on_its_number_and_not_on_what_was_asked_before(
    data: CachedDataset, found: Any, tiny_family: Any, tmp_path: Path
) -> None:
    straight = [data.batch(step) for step in range(4 * data.batches_per_epoch)]
    torch.manual_seed(5)
    fresh = prepare(tiny_family, list(reversed(found)), SETTINGS, Cache(tmp_path / "cache"))
    for step in reversed(range(len(straight))):
        assert same(fresh.batch(step), straight[step])


def test_batches_leave_the_global_random_state_alone(data: CachedDataset) -> None:
    before = torch.get_rng_state()
    for step in range(30):
        data.batch(step)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_shows_every_picture_as_often_as_it_repeats(data: CachedDataset) -> None:
    assert data.batches_per_epoch == 4 + 3 + 2  # 11 squares, 8 wide, 4 tall, three a batch
    for epoch in range(5):
        batches = epoch_of(data, epoch)
        shown = Counter(name for batch in batches for name in batch.ids)
        assert len(shown) == 12
        assert shown.pop("girls/g.png") == 1
        assert set(shown.values()) == {2}
        assert {batch.epoch for batch in batches} == {epoch}


def test_repeats_are_spread_over_the_epoch(found: Any, tiny_family: Any, tmp_path: Path) -> None:
    four = [replace(example, repeats=4) for example in found]
    data = prepare(tiny_family, four, replace(SETTINGS, micro_batch_size=1), Cache(tmp_path / "c"))
    names = [batch.ids[0] for batch in epoch_of(data, 3)]
    quarters = [names[i : i + 12] for i in range(0, 48, 12)]
    assert [len(set(quarter)) for quarter in quarters] == [12] * 4
    assert len({tuple(quarter) for quarter in quarters}) == 4


def test_the_batch_that_is_not_full_comes_anywhere(data: CachedDataset) -> None:
    places = {i for epoch in range(60) for i, batch in enumerate(epoch_of(data, epoch)) if len(batch.ids) == 1}
    assert places == set(range(data.batches_per_epoch))


def test_epochs_and_seeds_have_orders_of_their_own(
    data: CachedDataset, found: Any, tiny_family: Any, tmp_path: Path
) -> None:
    orders = {tuple(batch.ids for batch in epoch_of(data, epoch)) for epoch in range(6)}
    assert len(orders) == 6
    other = prepare(tiny_family, found, replace(SETTINGS, seed=12), Cache(tmp_path / "cache"))
    assert [b.ids for b in epoch_of(other, 0)] != [b.ids for b in epoch_of(data, 0)]


def test_the_order_of_seed_11_stays_what_it_is(data: CachedDataset) -> None:
    """A change here breaks the resume of every run that is under way."""
    names = [" ".join(name[-6:-4] for name in data.batch(step).ids) for step in range(9)]
    assert names == ORDER_OF_SEED_11


ORDER_OF_SEED_11 = [
    "01 02 04", "03 00", "09", "10 09 10", "07 06 05", "/g 03 04", "08 06 05", "08 07", "02 01 00"
]  # fmt: skip


def test_a_batch_is_of_one_size_and_tells_it(data: CachedDataset) -> None:
    sizes = Counter()
    for batch in epoch_of(data, 0):
        size = len(batch.ids)
        sizes[size] += 1
        assert batch.latents.dtype == torch.float32
        assert batch.latents.shape[:2] == (size, 4)
        assert batch.weights.shape == (size,)
        assert batch.text["prompt_embeds"].shape == (size, 4, 8)
        height, width = (8 * side for side in batch.latents.shape[-2:])
        assert batch.conditioning.target_sizes.tolist() == [[height, width]] * size
        assert batch.conditioning.target_sizes.dtype == torch.int64
        assert batch.masks is None
    assert sizes == {3: 3 + 2 + 1, 2: 1 + 1, 1: 1}


def test_conditioning_follows_the_crop_and_the_mirror(make: Any, tiny_family: Any, tmp_path: Path) -> None:
    width = next(w for w in range(70, 120) if (cut := assign(w, 64, SETTINGS.rules)).resize_w - cut.bucket_w == 5)
    make.noise(width, 64).save(tmp_path / "a.png")
    found = scan([FolderSpec(path=str(tmp_path), flip=True)]).examples
    data = prepare(tiny_family, found, SETTINGS, Cache(tmp_path / "c"))
    plain, turned = (data.fixed([found[0].id], flip=flip)[0].conditioning for flip in (False, True))
    assert plain.original_sizes.tolist() == turned.original_sizes.tolist() == [[64, width]]
    assert plain.crop_top_lefts.tolist() == [[0, 2]]
    assert turned.crop_top_lefts.tolist() == [[0, 3]]


def test_flips_are_half_of_the_samples_and_match_the_mirrored_latents(data: CachedDataset) -> None:
    items = {item.example.id: item for item in data.items}
    flips = Counter()
    for epoch in range(30):
        for batch in epoch_of(data, epoch):
            for row, name in enumerate(batch.ids):
                item = items[name]
                is_plain = torch.equal(batch.latents[row], item.latents)
                assert is_plain or torch.equal(batch.latents[row], item.flipped)
                flips[name, is_plain] += 1
    assert flips["girls/g.png", False] == 0
    turned = sum(count for (name, plain), count in flips.items() if not plain)
    assert turned / (30 * 22) == pytest.approx(0.5, abs=0.06)


def test_captions_vary_and_drop_out_by_their_share(data: CachedDataset) -> None:
    texts: dict[str, Counter[str]] = {}
    for epoch in range(60):
        for batch in epoch_of(data, epoch):
            for name, text in zip(batch.ids, batch.texts, strict=True):
                texts.setdefault(name, Counter())[text] += 1
    dropped = sum(seen[""] for name, seen in texts.items() if name.startswith("own"))
    assert dropped / (60 * 22) == pytest.approx(0.2, abs=0.04)
    for name, seen in texts.items():
        if name.startswith("own"):
            assert len(seen) >= 6
            number = str(int(name[5:7]))
            assert all(sorted(text.split(", ")) == ["a", "b", "c", f"p{number}"] for text in seen if text)


def test_embeddings_are_those_of_the_text(data: CachedDataset, tiny_family: Any) -> None:
    for step in range(12):
        batch = data.batch(step)
        wanted = tiny_family.encode_texts(list(batch.texts))
        assert all(torch.equal(batch.text[name], wanted[name]) for name in wanted)


def test_regularisation_pictures_weigh_what_the_folder_says(data: CachedDataset) -> None:
    for batch in epoch_of(data, 0):
        assert batch.weights.tolist() == [0.5 if name.startswith("girls") else 1.0 for name in batch.ids]


def test_regularisation_pictures_go_without_the_trigger(found: Any) -> None:
    settings = replace(SETTINGS, trigger="mika")
    own, girl = found[0], replace(found[-1], captions=("[trigger], a girl",))
    assert girl.prior
    assert all(text.startswith("mika, ") for text in settings.texts(own))
    assert settings.texts(girl) == ("a girl",)


def test_fixed_batches_have_plain_captions_and_no_dropout(data: CachedDataset) -> None:
    batches = data.fixed(["own/p06.png", "own/p00.png", "own/p05.png"])
    assert [batch.ids for batch in batches] == [("own/p06.png", "own/p05.png"), ("own/p00.png",)]
    assert batches[0].texts == ("p6, a, b, c", "p5, a, b, c")
    assert same(batches[1], data.fixed(["own/p00.png"])[0])
    with pytest.raises(KeyError):
        data.fixed(["own/none.png"])
    with pytest.raises(ValueError, match="not encoded flipped"):
        data.fixed(["girls/g.png"], flip=True)


def test_pictures_named_in_mirror_can_be_shown_mirrored(found: Any, tiny_family: Any, tmp_path: Path) -> None:
    data = prepare(tiny_family, found, SETTINGS, Cache(tmp_path / "c"), also_flipped=["girls/g.png"])
    plain, turned = (data.fixed(["girls/g.png"], flip=flip)[0].latents for flip in (False, True))
    assert not torch.equal(plain, turned)
    shown = [b for epoch in range(20) for b in epoch_of(data, epoch) if "girls/g.png" in b.ids]
    rows = [batch.latents[batch.ids.index("girls/g.png")] for batch in shown]
    assert all(torch.equal(row, plain[0]) for row in rows)  # a validation's mirror is not trained on


def test_without_leaves_pictures_out_and_shares_the_rest(data: CachedDataset) -> None:
    less = data.without(["own/p00.png", "own/p01.png"])
    assert less.num_images == 10
    shown, whole = (sum(len(batch.ids) for batch in epoch_of(part, 0)) for part in (less, data))
    assert shown == whole - 4
    names = {name for batch in epoch_of(less, 0) for name in batch.ids}
    assert names.isdisjoint({"own/p00.png", "own/p01.png"})
    assert less.items[0].latents.data_ptr() in {item.latents.data_ptr() for item in data.items}
    with pytest.raises(DatasetError):
        data.without([example.id for example in data.examples])


def test_texts_are_carried_where_the_text_encoders_are_trained(found: Any, tiny_family: Any, tmp_path: Path) -> None:
    data = prepare(tiny_family, found, replace(SETTINGS, encode_texts=False), Cache(tmp_path / "c"))
    assert tiny_family.texts == []
    assert data.batch(0).text == {}
    assert any(data.batch(0).texts)


def test_a_negative_step_is_refused(data: CachedDataset) -> None:
    with pytest.raises(ValueError, match="micro_step is -1"):
        data.batch(-1)


def test_shards_share_the_pictures_out(found: Any, tiny_family: Any, tmp_path: Path) -> None:
    parts = [prepare(tiny_family, found, replace(SETTINGS, shard=f"{i}/3"), Cache(tmp_path / "c")) for i in (1, 2, 3)]
    names = [{example.id for example in part.examples} for part in parts]
    assert [len(part) for part in names] == [4, 4, 4]
    assert set.union(*names) == {example.id for example in found}
    assert take_shard(found, None) == found
    assert take_shard(list(reversed(found)), "2/3") == tuple(reversed(take_shard(found, "2/3")))
    for bad in ("0/2", "3/2", "a/b", "1/0", "1"):
        with pytest.raises(ConfigError, match="not a part of a whole"):
            take_shard(found, bad)
    with pytest.raises(DatasetError, match="is empty"):
        take_shard(found[:1], "2/2")


@pytest.mark.parametrize(("asked", "held"), [({"count": 3}, 3), ({"fraction": 0.25}, 3), ({"count": 0}, 0)])
def test_held_out_pictures_are_a_stable_choice_over_the_shapes(found: Any, asked: dict[str, Any], held: int) -> None:
    train, out = split_held_out(found, seed=1, **asked)
    assert len(out) == held
    assert {e.id for e in train} | {e.id for e in out} == {e.id for e in found}
    assert len(train) + len(out) == len(found)
    assert not any(example.prior for example in out)
    again = split_held_out(list(reversed(found)), seed=1, **asked)[1]
    assert {e.id for e in again} == {e.id for e in out}
    if held:
        splits = [split_held_out(found, seed=s, **asked)[1] for s in range(20)]
        assert all({(96, 64), (64, 64)} <= {(e.width, e.height) for e in some} for some in splits)
        assert any((64, 96) in {(e.width, e.height) for e in some} for some in splits)
        assert len({tuple(e.id for e in some) for some in splits}) > 6


def test_copies_of_a_held_out_picture_are_held_out_too(tmp_path: Path, make: Any) -> None:
    for index in range(8):
        for copy in "ab":
            make.noise(seed=index).save(tmp_path / f"{index}{copy}.png")
    train, out = split_held_out(scan([FolderSpec(path=str(tmp_path))]).examples, count=2, seed=0)
    assert len(out) == 4
    assert {e.sha256 for e in train}.isdisjoint(e.sha256 for e in out)


def test_something_is_always_left_to_train(found: Any) -> None:
    assert len(split_held_out(found, fraction=1.0, seed=0)[0]) == 2  # one own picture and the prior one
    with pytest.raises(ValueError, match="needs one of"):
        split_held_out(found, seed=0)


def test_the_fingerprint_follows_names_contents_and_captions(found: Any) -> None:
    whole = fingerprint(found)
    assert whole == fingerprint(list(reversed(found)))
    changes = [
        replace(found[0], sha256="0" * 64),
        replace(found[0], captions=("other",)),
        replace(found[0], id="own/renamed.png"),
        replace(found[0], file_size=1),
    ]
    prints = {fingerprint([change, *found[1:]]) for change in changes} | {fingerprint(found[1:])}
    assert len(prints) == 5
    assert whole not in prints
    moved = replace(found[0], path=Path("/elsewhere/p00.png"))
    assert fingerprint([moved, *found[1:]]) == whole
    before, after = example_digests(found), example_digests([changes[0], *found[2:]])
    assert {name for name in before if after.get(name) != before[name]} == {found[0].id, found[1].id}


def test_pictures_that_are_not_shown_make_room_for_others_of_their_folder_and_size(data: CachedDataset) -> None:
    gone = "own/p00.png"
    for step in range(6 * data.batches_per_epoch):
        usual, changed = data.batch(step), data.batch(step, {gone: 0.0})
        assert gone not in changed.ids
        assert changed.latents.shape == usual.latents.shape
        for before, after in zip(usual.ids, changed.ids, strict=True):
            assert before == after or (before == gone and after.startswith("own/"))
    assert same(data.batch(3, {gone: 0.0}), data.batch(3, {gone: 0.0}))


def test_a_picture_with_a_share_is_shown_about_that_often_and_one_without_others_stays(data: CachedDataset) -> None:
    steps = range(40 * data.batches_per_epoch)
    usual = Counter(name for step in steps for name in data.batch(step).ids)
    seldom = Counter(name for step in steps for name in data.batch(step, {"own/p00.png": 0.25}).ids)
    assert 0.1 < seldom["own/p00.png"] / usual["own/p00.png"] < 0.4
    assert sum(seldom.values()) == sum(usual.values())
    lonely = Counter(name for step in steps for name in data.batch(step, {"girls/g.png": 0.0}).ids)
    assert lonely["girls/g.png"] == usual["girls/g.png"]
