"""What is encoded, once, and what the cache spares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from emotrain.config.schema import DatasetSection
from emotrain.dataset.buckets import BucketRules
from emotrain.dataset.cache import Cache
from emotrain.dataset.cachedir import entry_path
from emotrain.dataset.encode import prepare
from emotrain.dataset.loader import CachedDataset
from emotrain.dataset.scan import FolderSpec, scan
from emotrain.dataset.settings import LoaderSettings, settings_from
from emotrain.errors import ConfigError, DatasetError, ModelError, ResourceError

RULES = BucketRules((64,), 8)


def examples(root: Path, **options: Any) -> Any:
    return scan([FolderSpec(path=str(root), **options)]).examples


def load(family: Any, found: Any, cache_dir: Path, **options: Any) -> CachedDataset:
    also_flipped = options.pop("also_flipped", ())
    return prepare(family, found, LoaderSettings(RULES, **options), Cache(cache_dir), also_flipped=also_flipped)


@pytest.fixture
def root(folder: Any, make: Any) -> Path:
    files = {}
    for index in range(4):
        files[f"p{index}.png"] = make.encode(make.noise(96, 64, seed=index))
        files[f"p{index}.txt"] = f"tag{index}, a, b, c"
    return folder(files)


def test_the_second_time_nothing_is_encoded(root: Path, tmp_path: Path, tiny_family: Any) -> None:
    options = {"shuffle": True, "tag_dropout": 0.2, "variants": 4}
    first = load(tiny_family, examples(root, flip=True), tmp_path / "c", **options)
    pictures, texts = tiny_family.pictures, len(tiny_family.texts)
    assert pictures == 8
    assert texts == len(set(tiny_family.texts)) > 8
    again = load(tiny_family, examples(root, flip=True), tmp_path / "c", **options)
    assert (tiny_family.pictures, len(tiny_family.texts)) == (pictures, texts)
    for step in range(20):
        one, other = first.batch(step), again.batch(step)
        assert one.ids == other.ids
        assert torch.equal(one.latents, other.latents)
        assert all(torch.equal(one.text[name], other.text[name]) for name in one.text)


def test_a_renamed_or_moved_picture_finds_its_entry(root: Path, tmp_path: Path, tiny_family: Any, make: Any) -> None:
    load(tiny_family, examples(root), tmp_path / "c")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "new name.png").write_bytes((root / "p0.png").read_bytes())
    (moved / "new name.txt").write_text("tag0, a, b, c")
    before = (tiny_family.pictures, len(tiny_family.texts))
    load(tiny_family, examples(moved), tmp_path / "c")
    assert (tiny_family.pictures, len(tiny_family.texts)) == before


def test_an_edited_picture_or_caption_is_encoded_again(root: Path, tmp_path: Path, tiny_family: Any, make: Any) -> None:
    data = load(tiny_family, examples(root), tmp_path / "c")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in root.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    edited = make.noise(96, 64, seed=0)
    edited.putpixel((0, 0), (1, 2, 3))
    edited.save(copy / "p0.png")
    (copy / "p1.txt").write_text("tag1, a, b, d")
    pictures, texts = tiny_family.pictures, len(tiny_family.texts)
    other = load(tiny_family, examples(copy), tmp_path / "c")
    assert tiny_family.pictures == pictures + 1
    assert tiny_family.texts[texts:] == ["tag1, a, b, d"]
    assert other.fingerprint != data.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"rules": BucketRules((48,), 8)},
        {"vae": "vae-2"},
        {"background": "black"},
    ],
)
def test_other_sizes_encoders_and_backgrounds_have_entries_of_their_own(
    folder: Any, make: Any, tmp_path: Path, tiny_family: Any, change: dict[str, Any]
) -> None:
    image = make.noise(64, 64).convert("RGBA")
    image.putalpha(100)
    found = examples(folder({"a.png": make.encode(image)}))
    load(tiny_family, found, tmp_path / "c")
    tiny_family.vae = change.pop("vae", tiny_family.vae)
    prepare(tiny_family, found, LoaderSettings(**{"rules": RULES, **change}), Cache(tmp_path / "c"))
    assert tiny_family.pictures == 2


def test_another_text_encoder_encodes_captions_again(root: Path, tmp_path: Path, tiny_family: Any) -> None:
    load(tiny_family, examples(root), tmp_path / "c")
    count = len(tiny_family.texts)
    tiny_family.text = "text-2"
    load(tiny_family, examples(root), tmp_path / "c")
    assert len(tiny_family.texts) == 2 * count
    assert tiny_family.pictures == 4


def test_a_damaged_entry_is_noticed_and_made_again(root: Path, tmp_path: Path, tiny_family: Any) -> None:
    first = load(tiny_family, examples(root), tmp_path / "c")
    entries = sorted((tmp_path / "c").rglob("*.safetensors"))
    for path in entries:
        data = bytearray(path.read_bytes())
        data[-3] ^= 0x40
        path.write_bytes(bytes(data))
    made = tiny_family.pictures + len(tiny_family.texts)
    again = load(tiny_family, examples(root), tmp_path / "c")
    assert tiny_family.pictures + len(tiny_family.texts) == 2 * made
    assert torch.equal(first.batch(0).latents, again.batch(0).latents)


def test_a_full_disk_changes_no_batch(
    root: Path, tmp_path: Path, tiny_family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = load(tiny_family, examples(root), tmp_path / "c")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    said: list[str] = []
    poor = prepare(tiny_family, examples(root), LoaderSettings(RULES), Cache(tmp_path / "full", said.append))
    assert len(said) == 1
    assert torch.equal(good.batch(3).latents, poor.batch(3).latents)


def test_nothing_is_written_beside_the_pictures(root: Path, tmp_path: Path, tiny_family: Any) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in root.iterdir()}
    load(tiny_family, examples(root, flip=True), tmp_path / "c")
    assert {path.name: path.stat().st_mtime_ns for path in root.iterdir()} == before


def test_latents_are_of_the_placed_picture_and_its_mirror(
    folder: Any, make: Any, tmp_path: Path, tiny_family: Any
) -> None:
    image = Image.new("RGB", (128, 128), "black")
    image.paste("white", (0, 0, 64, 128))
    found = examples(folder({"a.png": make.encode(image)}), flip=True)
    data = load(tiny_family, found, tmp_path / "c")
    (item,) = data.items
    assert item.latents.shape == (4, 8, 8)
    assert item.latents[0, 0].tolist() == pytest.approx([1, 1, 1, 1, -1, -1, -1, -1], abs=0.15)
    assert item.flipped is not None
    assert torch.allclose(item.flipped, item.latents.flip(-1), atol=0.05)


def test_progress_names_both_phases(root: Path, tmp_path: Path, tiny_family: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    prepare(
        tiny_family,
        examples(root),
        LoaderSettings(RULES),
        Cache(tmp_path / "c"),
        lambda *told: seen.append(told),
    )
    assert seen[:4] == [("pictures", n, 4) for n in (1, 2, 3, 4)]
    assert seen[4:] == [("captions", n, 5) for n in (1, 2, 3, 4, 5)]


def test_all_pictures_that_cannot_be_decoded_are_named(
    folder: Any, make: Any, tmp_path: Path, tiny_family: Any
) -> None:
    good = make.encode(make.noise())
    cut = make.encode(make.noise(seed=2), "JPEG")
    found = examples(folder({"a.png": good, "b.jpg": cut[: len(cut) // 2], "c.jpg": cut[:-2]}))
    assert len(found) == 3
    with pytest.raises(DatasetError) as caught:
        load(tiny_family, found, tmp_path / "c")
    assert [problem.message.split()[0][-5:] for problem in caught.value.problems] == ["b.jpg", "c.jpg"]
    assert "truncated" in caught.value.message


@pytest.mark.parametrize("change", ["edited", "gone"])
def test_a_picture_that_changed_since_the_scan_is_refused(
    make: Any, tmp_path: Path, tiny_family: Any, change: str
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(make.encode(make.noise()))
    found = examples(tmp_path)
    path.write_bytes(make.encode(make.noise(seed=1))) if change == "edited" else path.unlink()
    with pytest.raises(DatasetError, match="has changed since" if change == "edited" else "does not exist"):
        load(tiny_family, found, tmp_path / "c")


def test_numbers_that_are_not_finite_name_their_picture(root: Path, tmp_path: Path, tiny_family: Any) -> None:
    tiny_family.encode_images = lambda pixels: torch.full((1, 4, 8, 8), float("nan"))
    with pytest.raises(ModelError, match=r"VAE .* not finite for data/p0.png") as caught:
        load(tiny_family, examples(root), tmp_path / "c")
    assert caught.value.exit_code == 4
    assert not list((tmp_path / "c").rglob("*.safetensors"))


def test_embeddings_are_kept_narrow_only_where_nothing_is_lost(root: Path, tmp_path: Path, tiny_family: Any) -> None:
    plain = tiny_family.encode_texts
    full = load(tiny_family, examples(root), tmp_path / "c")
    tiny_family.encode_texts = lambda texts: {n: v.bfloat16().float() for n, v in plain(texts).items()}
    half = load(tiny_family, examples(root), tmp_path / "d")
    for data, encode in ((full, plain), (half, tiny_family.encode_texts)):
        batch = data.fixed(["data/p1.png"])[0]
        wanted = encode(["tag1, a, b, c"])
        assert all(torch.equal(batch.text[name], wanted[name]) for name in wanted)
        assert all(value.dtype == torch.float32 for value in batch.text.values())
    saved = sum(half._rows[""][n].element_size() for n in half._rows[""])
    assert saved * 2 == sum(full._rows[""][n].element_size() for n in full._rows[""])


def test_captions_beyond_the_memory_limit_are_read_back(root: Path, tmp_path: Path, tiny_family: Any) -> None:
    wide = load(tiny_family, examples(root), tmp_path / "c")
    narrow = load(tiny_family, examples(root), tmp_path / "c", text_memory=400)
    assert narrow.nbytes() < wide.nbytes()
    for step in range(12):
        one, other = wide.batch(step), narrow.batch(step)
        assert one.texts == other.texts
        assert all(torch.equal(one.text[name], other.text[name]) for name in one.text)
    for path in (tmp_path / "c" / "v1" / "texts").rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(ResourceError, match="was cleared or damaged"):
        narrow.fixed([f"data/p{i}.png" for i in range(4)])


def test_captions_are_held_whatever_the_limit_where_the_disk_refuses(
    root: Path, tmp_path: Path, tiny_family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    data = load(tiny_family, examples(root), tmp_path / "c", text_memory=0)
    assert data.fixed(["data/p0.png"])[0].text["prompt_embeds"].shape == (1, 4, 8)


def test_masks_follow_the_picture(folder: Any, make: Any, tmp_path: Path, tiny_family: Any) -> None:
    image = make.noise(64, 64).convert("RGBA")
    image.putalpha(Image.new("L", (64, 64), 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    opaque = make.encode(make.noise(64, 64, seed=5))
    root = folder({"a.png": make.encode(image), "b.png": opaque})
    data = load(tiny_family, examples(root, mask="alpha", flip=True), tmp_path / "c", micro_batch_size=2)
    batch = data.fixed(["data/a.png", "data/b.png"])[0]
    assert batch.masks is not None
    assert batch.masks.shape == (2, 1, 8, 8)
    assert batch.masks[0, 0, 3].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.masks[1].min() == 1
    flipped = data.fixed(["data/a.png"], flip=True)[0]
    assert flipped.masks is not None
    assert flipped.masks[0, 0, 3].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert data.fixed(["data/b.png"])[0].masks is None


def test_a_mask_folder_weights_latents_by_their_pixels(
    folder: Any, make: Any, tmp_path: Path, tiny_family: Any
) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    mask = Image.new("L", (96, 64), 0)
    mask.paste(255, (0, 0, 96, 4))  # upper half of the first row of latents
    mask.save(masks / "a.png")
    found = examples(folder({"a.png": make.encode(make.noise(96, 64))}), mask=str(masks))
    rules = BucketRules((80,), 8)
    settings = LoaderSettings(rules)
    data = prepare(tiny_family, found, settings, Cache(tmp_path / "c"))
    (item,) = data.items
    assert item.placement.size == (96, 64)
    assert item.mask is not None
    assert item.mask.shape == (1, 8, 12)
    assert item.mask[0, 0].tolist() == pytest.approx([0.5] * 12, abs=0.01)
    assert item.mask[0, 1:].max() == 0
    mask.paste(255, (0, 0, 96, 64))
    mask.save(masks / "a.png")
    assert prepare(tiny_family, found, settings, Cache(tmp_path / "c")).items[0].mask is None


def test_every_resolution_has_its_own_latents(folder: Any, make: Any, tmp_path: Path, tiny_family: Any) -> None:
    found = examples(
        folder({"big.png": make.encode(make.noise(128, 128)), "small.png": make.encode(make.noise(64, 64))})
    )
    settings = LoaderSettings(BucketRules((64, 128), 8))
    data = prepare(tiny_family, found, settings, Cache(tmp_path / "c"))
    assert sorted((item.example.path.stem, *item.placement.size) for item in data.items) == [
        ("big", 64, 64), ("big", 128, 128), ("small", 64, 64)
    ]  # fmt: skip
    assert (data.num_images, data.batches_per_epoch) == (2, 3)


def test_settings_come_from_the_preset_and_the_family(root: Path) -> None:
    section = DatasetSection.model_validate(
        {
            "folders": [{"path": str(root)}],
            "trigger": "mika",
            "captions": {"shuffle": True, "keep_tokens": 2, "dropout": 0.1},
            "shard": "1/2",
        },
        strict=False,
    )
    settings = settings_from(section, resolution=512, step=64, micro_batch_size=4, seed=7)
    assert settings.rules == BucketRules((512,), 64)
    assert (settings.trigger, settings.shuffle, settings.keep_tokens) == ("mika", True, 2)
    assert (settings.dropout, settings.micro_batch_size, settings.seed, settings.shard) == (0.1, 4, 7, "1/2")
    for buckets, words in (({"min": 900, "max": 300}, "above max_side"), ({"step": 40}, "multiple of 64")):
        bad = section.model_copy(update={"buckets": section.buckets.model_copy(update=buckets)})
        with pytest.raises(ConfigError, match=words):
            settings_from(bad, resolution=512, step=64)


def test_two_pictures_of_one_id_are_refused(make: Any, tmp_path: Path, tiny_family: Any) -> None:
    found = []
    for parent in ("train", "val"):
        (tmp_path / parent / "img").mkdir(parents=True)
        make.noise().save(tmp_path / parent / "img" / "a.png")
        found += examples(tmp_path / parent / "img")
    with pytest.raises(DatasetError, match="two pictures have the id img/a.png"):
        load(tiny_family, found, tmp_path / "c")


def test_entries_say_what_they_are_for(root: Path, tmp_path: Path, tiny_family: Any) -> None:
    load(tiny_family, examples(root), tmp_path / "c")
    path = next((tmp_path / "c" / "v1" / "latents").rglob("*.safetensors"))
    data = path.read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert path == entry_path(tmp_path / "c", "latents", head["__metadata__"]["key"])


def mixed(folder: Any, make: Any) -> Any:
    """Five pictures of two sizes, the sizes taking turns."""
    shapes = [(96, 64), (64, 96), (96, 64), (64, 96), (96, 64)]
    root = folder({f"{i}.png": make.encode(make.noise(*shape, seed=i)) for i, shape in enumerate(shapes)})
    return examples(root, flip=True)


def test_pictures_of_one_size_are_encoded_together_and_come_back_in_order(
    folder: Any, make: Any, tmp_path: Path, tiny_family: Any
) -> None:
    found = mixed(folder, make)
    alone = load(tiny_family, found, tmp_path / "alone")
    assert {shape[0] for shape in tiny_family.batches} == {1}
    tiny_family.batches, tiny_family.pictures_at_once = [], 4
    together = load(tiny_family, found, tmp_path / "together")
    assert sorted(shape[0] for shape in tiny_family.batches) == [2, 4, 4]
    assert [item.example.id for item in together.items] == [item.example.id for item in alone.items]
    for one, other in zip(alone.items, together.items, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert one.flipped is not None
        assert other.flipped is not None
        assert torch.equal(one.flipped, other.flipped)
    entries = [sorted(path.name for path in (tmp_path / name).rglob("*.safetensors")) for name in ("alone", "together")]
    assert entries[0] == entries[1]


def test_no_more_than_a_few_decoded_pictures_wait(
    folder: Any, make: Any, tmp_path: Path, tiny_family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emotrain.dataset import encode

    monkeypatch.setattr(encode, "MOST_WAITING", 3)
    tiny_family.pictures_at_once = 100
    load(tiny_family, mixed(folder, make), tmp_path / "c")
    assert tiny_family.pictures == 10
    assert max(shape[0] for shape in tiny_family.batches) <= 4
