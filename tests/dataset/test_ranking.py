"""Pictures are ranked by what is left of their losses once the noise scale is taken out."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from emotrain.dataset.contrasts import PictureContrast, contrast_scores, parse_contrasts
from emotrain.dataset.ranking import (
    NO_CAPTION,
    LossRecord,
    excess,
    parse_losses,
    rank,
    robust_z,
)


def usual_loss(position: float, step: int) -> float:
    """Thirty times as high at one end of the noise scale as at the other, and falling over the run."""
    return math.exp(-3.4 * position) * (0.7 + 0.3 * math.exp(-step / 200))


def run(steps: int = 640, hard: str = "", memorised: str = "", seed: int = 0) -> list[LossRecord]:
    rng = random.Random(seed)
    names = [f"data/{k:02}.png" for k in range(16)]
    own = {name: rng.gauss(0, 0.05) for name in names}
    records = []
    for step in range(1, steps + 1):
        name = names[step % 16] if step % 17 else rng.choice(names)
        level = own[name] + rng.gauss(0, 0.15)
        level += 0.8 if name == hard else 0.0
        level -= 1.2 * step / steps if name == memorised else 0.0
        position = rng.random()
        records.append(LossRecord(step, name, position, usual_loss(position, step) * math.exp(level)))
    return records


def contrast(k: int, own: float, captions: int = 16) -> PictureContrast:
    """Picture k: twice as hard for odd ones, and captions of which every third is bad for all pictures."""
    hard = 2.0 if k % 2 else 1.0
    luck = random.Random(k)
    others = tuple(
        (f"data/{j:02}.png", (0.12 * hard * bad(j) * math.exp(luck.gauss(0, 0.05)),)) for j in range(captions) if j != k
    )
    return PictureContrast(f"data/{k:02}.png", (own * hard * bad(k),), others)


def bad(caption: int) -> float:
    return 1.4 if caption % 3 == 0 else 1.0


def test_excess_takes_the_noise_scale_out() -> None:
    positions = np.random.default_rng(0).random(4000)
    losses = [usual_loss(position, 100) for position in positions]
    assert np.std(np.log(losses)) > 0.9
    assert np.abs(excess(list(positions), losses)).max() < 0.15


def test_a_hard_and_a_memorised_picture_come_first() -> None:
    scores = rank(run(hard="data/03.png", memorised="data/11.png"))
    assert [(score.id, score.verdict) for score in scores[:2]] == [
        ("data/03.png", "suspicious"),  # high from the start, and no contrast that speaks for its caption
        ("data/11.png", "memorised"),
    ]
    assert {score.verdict for score in scores[2:]} == {"normal"}


def test_a_contrast_tells_hard_from_suspicious() -> None:
    contrasts = [contrast(k, 0.10 + k % 3 / 4000) for k in range(16)]
    contrasts[5] = contrast(5, 0.13)
    scores = {score.id: score for score in rank(run(hard="data/03.png"), contrasts)}
    assert scores["data/03.png"].verdict == "hard"
    assert scores["data/05.png"].verdict == "suspicious"
    assert next(iter(scores)) == "data/05.png"


def test_a_model_that_hardly_hears_any_caption_accuses_none() -> None:
    """Own captions 1.5 deviations better than wrong ones: by chance a sixth of them are no better."""
    rng = random.Random(0)
    contrasts = [contrast(k, 0.12 * math.exp(-0.08 + rng.gauss(0, 0.05))) for k in range(16)]
    assert {score.verdict for score in rank(run(), contrasts)} == {"normal"}


def test_a_model_that_makes_nothing_of_captions_accuses_none() -> None:
    contrasts = [contrast(k, 0.12) for k in range(16)]
    scores = rank(run(), contrasts)
    assert {score.verdict for score in scores} == {"normal"}
    assert all(score.z_contrast is not None for score in scores)


def test_pictures_without_a_fault_are_usual() -> None:
    for seed in range(5):
        assert {score.verdict for score in rank(run(seed=seed))} == {"normal"}


def test_a_picture_whose_positions_were_unlucky_is_not_hard() -> None:
    records = [
        LossRecord(step, name, place, usual_loss(place, 50))
        for step in range(1, 101)
        for name, place in (("noisy", random.Random(step).random() * 0.2), ("clean", random.Random(-step).random()))
    ]
    for score in rank(records):
        assert score.verdict == "normal"
        assert abs(score.late) < 0.1


def test_samples_without_their_caption_make_no_picture_hard() -> None:
    records = run()
    dropped = [one._replace(loss=9 * one.loss, captioned=False) for one in records[::5] if one.id == "data/07.png"]
    assert rank([*records, *dropped]) == rank(records)
    assert rank([*records, *(one._replace(captioned=True) for one in dropped)]) != rank(records)
    never = [one._replace(captioned=False) if one.id == "data/03.png" else one for one in run(hard="data/03.png")]
    assert rank(never)[0].id == "data/03.png"  # a picture that never had a caption is ranked all the same


def test_pictures_hardly_seen_come_last_and_are_not_judged() -> None:
    scores = rank([*run(), LossRecord(600, "new.png", 0.5, 9.0)], ids=["never.png"])
    assert {(score.id, score.verdict, score.visits) for score in scores[-2:]} == {
        ("never.png", "unseen", 0),
        ("new.png", "unseen", 1),
    }


def test_the_ranking_does_not_depend_on_the_order_of_records() -> None:
    records = run(hard="data/03.png")
    assert rank(records) == rank(random.Random(1).sample(records, len(records)))


def test_a_swapped_caption_scores_as_a_wrong_one_and_the_right_ones_below() -> None:
    scores = contrast_scores([contrast(k, 0.12 if k == 4 else 0.10) for k in range(16)])
    assert abs(scores.pop("data/04.png")) < 1.5
    assert max(scores.values()) < -1.8


def test_contrast_takes_hard_pictures_and_bad_captions_out() -> None:
    scores = contrast_scores([contrast(k, 0.10) for k in range(16)])
    assert np.ptp(list(scores.values())) < 2  # bad captions alone would make 6 deviations of a difference
    assert contrast_scores([]) == {}
    with pytest.raises(ValueError, match="c has no losses to compare"):
        contrast_scores([PictureContrast("c", (0.1,), (("d", (0.1, 0.2)), ("e", (0.1, 0.2))))])
    with pytest.raises(ValueError, match="c has no losses to compare"):
        contrast_scores([PictureContrast("c", (0.1,), (("d", (0.1,)),))])


def test_few_comparisons_are_not_taken_for_sure_ones() -> None:
    """With two others a picture's own part fits half of what there is: the deviation must not come out small."""
    rng = random.Random(3)
    level = 0.1
    pictures = [
        PictureContrast(
            str(k), (math.exp(rng.gauss(0, level)),),
            tuple((str((k + j) % 60), (math.exp(rng.gauss(0, level)),)) for j in (1, 2)),
        )
        for k in range(60)
    ]  # fmt: skip
    spread = float(np.std(list(contrast_scores(pictures).values())))
    assert 0.7 < spread < 1.4


def test_a_log_is_read_and_its_cut_off_end_left_out() -> None:
    lines = [
        json.dumps({"step": 1, "samples": [["a b/\u732b.png", 0.25, 0.5], ["c.png", 0.5, 0.25, "more"]]}),
        "",
        json.dumps({"step": 2, "samples": [["c.png", 0.75, float("nan")]]}),
        json.dumps({"step": 3, "samples": [["c.png", 0.75, 0.5, NO_CAPTION]]}),
        '{"step": 4, "samples": [["c.p',
    ]
    assert parse_losses(lines) == [
        LossRecord(1, "a b/\u732b.png", 0.25, 0.5),
        LossRecord(1, "c.png", 0.5, 0.25),
        LossRecord(3, "c.png", 0.75, 0.5, captioned=False),
    ]


@pytest.mark.parametrize("line", ["no json", "[]", '{"step": 1}', '{"step": 1, "samples": [["a"]]}'])
def test_a_bad_line_inside_a_log_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 1 is not a step"):
        parse_losses([line, '{"step": 2, "samples": []}'])
    with pytest.raises(ValueError, match="line 1 is not a picture"):
        parse_contrasts([line])


def test_contrasts_are_read_back() -> None:
    line = json.dumps({"id": "a", "own": [0.1, 0.2], "others": {"b": [0.3, 0.4]}})
    (read,) = parse_contrasts([line, ""])
    assert json.dumps(read.to_dict()) == line
    assert [read] == [PictureContrast("a", (0.1, 0.2), (("b", (0.3, 0.4)),))]


def test_robust_z_is_not_moved_by_an_outlier() -> None:
    values = [0.0, 0.1, -0.1, 0.2, -0.2, 50.0]
    assert abs(robust_z(values)[0]) < 0.6
    assert robust_z(values)[-1] > 100
    assert list(robust_z([1.0, 1.0, 1.0])) == [0.0, 0.0, 0.0]


def test_nothing_to_rank_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        rank([])
    with pytest.raises(ValueError, match="0 positions and 0 losses"):
        excess([], [])
