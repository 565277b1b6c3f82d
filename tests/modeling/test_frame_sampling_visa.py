"""Frame sampling: worked out by hand, and its promises over all short videos."""

import re

import numpy as np
import pytest

from visa_hf.modeling.frame_sampling_visa import (
    frames_around,
    frames_between,
    reference_frames_for,
    select_frames,
    spread_frames,
)


def test_global_local_by_hand():
    # 100 frames: the middles of six parts, and six frames around frame 50.
    selection = select_frames(100)
    assert selection.target_idx == 50
    assert selection.reference_idx == (8, 25, 41, 47, 48, 49, 50, 51, 52, 58, 75, 91)


def test_overlap_is_made_up_for_by_a_longer_local_part():
    # Spread: 1, 5, 8, 11, 15, 18; around 10: 7..12 holds 8 and 11 already, so the window grows to 6..13.
    assert select_frames(20).reference_idx == (1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 18)


def test_spread_and_local_frames_by_hand():
    assert spread_frames(10, 4) == (1, 3, 6, 8)
    assert spread_frames(3, 4) == (0, 1, 2)
    assert frames_around(10, 5, 4) == (3, 4, 5, 6)
    assert frames_around(10, 0, 4) == (0, 1, 2, 3)
    assert frames_around(10, 9, 3) == (7, 8, 9)


@pytest.mark.parametrize("strategy", ["global_local", "global", "local"])
@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_references_are_ascending_unique_and_as_many_as_possible(strategy, count):
    for num_frames in range(1, 40):
        for target in {0, num_frames // 2, num_frames - 1}:
            references = reference_frames_for(num_frames, target, count, strategy)
            assert list(references) == sorted(set(references))
            assert len(references) == min(count, num_frames)
            assert 0 <= references[0] and references[-1] < num_frames
            if strategy == "local":
                assert target in references


def test_the_default_target_is_the_middle_frame():
    assert [select_frames(n).target_idx for n in (1, 2, 3, 10, 11)] == [0, 1, 1, 5, 5]


def test_a_single_frame_is_its_own_reference():
    selection = select_frames(1)
    assert (selection.target_idx, selection.reference_idx) == (0, (0,))


def test_no_references():
    assert select_frames(10, strategy="none").reference_idx == ()
    assert select_frames(10, num_reference_frames=0).reference_idx == ()
    assert select_frames(10, reference_frames=[]).reference_idx == ()


def test_given_frames_are_put_in_time_order():
    selection = select_frames(10, target_frame=np.int64(9), reference_frames=[7, 0, 3])
    assert (selection.target_idx, selection.reference_idx) == (9, (0, 3, 7))
    assert isinstance(selection.target_idx, int)
    assert selection.reason == "a given target, 3 given references"


def test_a_part_of_the_video_is_sampled_like_a_video_of_its_own():
    whole = select_frames(30, num_reference_frames=6)
    part = select_frames(100, num_reference_frames=6, start=50, stop=80)
    assert part.target_idx == whole.target_idx + 50
    assert part.reference_idx == tuple(idx + 50 for idx in whole.reference_idx)
    assert part.num_frames == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "Frames 0 to -1 of 0 were chosen, but at least one frame inside the video is needed."),
        ({"num_frames": 9, "start": 3, "stop": 3}, "Frames 3 to 2 of 9 were chosen"),
        ({"num_frames": 9, "start": 3, "stop": 10}, "Frames 3 to 9 of 9 were chosen"),
        (
            {"num_frames": 5, "target_frame": 5},
            "`target_frame` is 5 but the video, or the part chosen of it, has frames 0",
        ),
        ({"num_frames": 5, "target_frame": -1}, "`target_frame` is -1 but the video"),
        (
            {"num_frames": 1, "target_frame": 1},
            "`target_frame` is 1 but the video, or the part chosen of it, has frame 0.",
        ),
        ({"num_frames": 9, "target_frame": 2, "start": 3}, "has frames 3 to 8. Give one of those."),
        ({"num_frames": 5, "reference_frames": [1, 7]}, "`reference_frames` is 7 but the video"),
        ({"num_frames": 5, "reference_frames": [1, 3, 1]}, "`reference_frames` names frame 1 twice"),
        ({"num_frames": 5, "strategy": "best"}, "`strategy` is 'best' but must be one of 'global_local', 'global'"),
        ({"num_frames": 5, "num_reference_frames": -1}, "`num_reference_frames` is -1 but must be at least 0"),
    ],
)
def test_bad_frames_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        select_frames(**arguments)


def test_a_fraction_of_a_frame_is_refused():
    with pytest.raises(TypeError):
        select_frames(5, target_frame=1.5)


# Variable rate; the first picture comes a little after the sound.
TIMES = [0.05, 0.1, 0.2, 0.7, 1.0]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, (0, 5)),
        (0, 1, (0, 4)),
        (0.1, None, (1, 5)),
        (0.11, 0.7, (2, 3)),
        ("0.2", "99", (2, 5)),
        ("1f", "3f", (1, 3)),
        ("2f", "99f", (2, 5)),
        ("1f", 0.7, (1, 3)),
    ],
)
def test_parts_are_half_open_in_seconds_and_in_frames(start, end, expected):
    assert frames_between(5, TIMES, start, end) == expected


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (
            "5f",
            None,
            "No frame lies between `start` 5f and `end` None: the video has 5 frames, the last of them at 1.000 s.",
        ),
        (2, None, "No frame lies between `start` 2 and `end` None"),
        ("3f", "3f", "No frame lies between"),
        (0.5, 0.2, "No frame lies between"),
        (-1, None, '`start` is -1 but must be seconds, like 2.5, or a frame number, like "120f".'),
        (None, "soon", "`end` is 'soon' but must be seconds"),
        (None, "-3f", "`end` is '-3f' but must be seconds"),
        (float("nan"), None, "`start` is nan but must be seconds"),
    ],
)
def test_bad_parts_are_refused(start, end, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        frames_between(5, TIMES, start, end)


def test_seconds_need_times():
    assert frames_between(5, None, "1f", "4f") == (1, 4)
    with pytest.raises(ValueError, match='`start` is 2.5 seconds, but this video has no times. Give a frame .* "2f"'):
        frames_between(5, None, 2.5)
