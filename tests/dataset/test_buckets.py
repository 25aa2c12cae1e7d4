"""Sizes: nearest aspect, not enlarged, hardly cropped, and no picture without one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emotrain.dataset.buckets import BucketRules, assign, make_buckets, place

SDXL = BucketRules((1024,), 64)
SIDES = st.integers(8, 6000)


def test_buckets_have_about_the_area_and_sides_of_the_step() -> None:
    sizes = make_buckets(1024, 64, 512, 1536)
    assert (1024, 1024) in sizes
    assert (832, 1216) in sizes
    assert (1216, 832) in sizes
    for width, height in sizes:
        assert width % 64 == height % 64 == 0
        assert min(width, height) >= 512
        assert max(width, height) <= 1536
        assert width * height <= 1024 * 1024
        assert (height, width) in sizes
    assert make_buckets(64, 8, 32, 96)[0] == (32, 96)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1024, 1024), (1024, 1024)),
        ((4000, 3000), (1152, 896)),
        ((3000, 4000), (896, 1152)),
        ((1920, 1080), (1344, 768)),
        ((1000, 1000), (960, 960)),
        ((500, 330), (448, 320)),
        ((2000, 500), (1536, 384)),
        ((30, 40), (64, 64)),
    ],
)
def test_a_picture_goes_to_the_bucket_of_nearest_aspect(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert assign(*size, SDXL).size == bucket


@given(SIDES, SIDES, st.sampled_from([(512, 8), (512, 64), (1024, 64), (1024, 16), (64, 8)]))
def test_every_picture_has_a_placement_inside_itself(width: int, height: int, family: tuple[int, int]) -> None:
    rules = BucketRules((family[0],), family[1])
    placed = assign(width, height, rules)
    assert placed.bucket_w % rules.step == placed.bucket_h % rules.step == 0
    assert placed.bucket_w * placed.bucket_h <= max(family[0] ** 2, rules.step**2, rules.step * max(placed.size))
    assert placed.resize_w >= placed.crop_left + placed.bucket_w
    assert placed.resize_h >= placed.crop_top + placed.bucket_h
    assert placed.resize_w == placed.bucket_w or placed.resize_h == placed.bucket_h
    assert 0.0 <= placed.crop_share < 1.0
    assert abs(placed.resize_w / width - placed.scale) <= 1 / width + 1e-9
    if min(width, height) >= rules.step:
        too_thin = max(width, height) / min(width, height) > max(rules.limits(family[0])) / rules.step
        assert not placed.enlarged or too_thin


@given(SIDES, SIDES)
def test_where_enlarging_is_allowed_only_full_buckets_are_used(width: int, height: int) -> None:
    rules = BucketRules((1024,), 64, upscale=True)
    placed = assign(width, height, rules)
    assert placed.size in make_buckets(1024, 64, 512, 1536)


@given(SIDES, SIDES)
def test_turning_a_picture_turns_its_bucket(width: int, height: int) -> None:
    one, other = assign(width, height, SDXL), assign(height, width, SDXL)
    assert one.crop_share == pytest.approx(other.crop_share, abs=0.01)
    assert sorted(one.size) == sorted(other.size)


def test_ordinary_photos_lose_little() -> None:
    for aspect in (1.0, 4 / 5, 3 / 4, 2 / 3, 9 / 16, 3 / 5):
        for turned in (aspect, 1 / aspect):
            placed = assign(round(2000 * math.sqrt(turned)), round(2000 / math.sqrt(turned)), SDXL)
            assert placed.crop_share < 0.06


def test_the_crop_is_centred_and_its_share_is_what_is_cut_off() -> None:
    placed = assign(600, 2000, SDXL)
    assert (placed.resize_w, placed.resize_h, placed.crop_left, placed.crop_top) == (512, 1707, 0, 85)
    assert placed.crop_share == pytest.approx(1 - 1536 / 1707)


def test_a_picture_is_trained_at_every_resolution_it_fills() -> None:
    rules = BucketRules((1024, 512, 768), 64)
    assert [placed.resolution for placed in place(2000, 2000, rules)] == [512, 768, 1024]
    assert [placed.size for placed in place(700, 700, rules)] == [(512, 512), (640, 640)]
    assert [placed.size for placed in place(200, 200, rules)] == [(192, 192)]
    up = BucketRules((1024, 512, 768), 64, upscale=True)
    assert [placed.size for placed in place(200, 200, up)] == [(512, 512), (768, 768), (1024, 1024)]


def test_own_limits_are_kept() -> None:
    rules = BucketRules((512,), 64, 320, 704)
    assert rules.limits(512) == (320, 704)
    assert BucketRules((512,), 64, 300, 700).limits(512) == (320, 640)
    assert assign(4000, 1000, rules).size == (704, 320)


def test_numbers_that_make_no_bucket_are_refused() -> None:
    with pytest.raises(ValueError, match="no resolution"):
        BucketRules((), 64)
    with pytest.raises(ValueError, match="above max_side"):
        BucketRules((512,), 64, 900, 300)
    with pytest.raises(ValueError, match="0 x 5"):
        assign(0, 5, SDXL)
