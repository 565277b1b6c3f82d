"""Tracking whole videos from their true first masks, and what is scored."""

import numpy as np
import pytest
import torch

from visa_hf import XMemConfig, XMemModel
from visa_hf.evaluation.metrics import boundary_f, region_similarity
from visa_hf.trainer.tracker_samples import TrackedVideo
from visa_hf.trainer.tracker_scores import score_tracker, track_video

SIZE = (40, 48)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return XMemModel(XMemConfig.tiny(memory_every=2, input_size=40)).eval()


@pytest.fixture
def video():
    """Two objects, the second from the third frame on; the masks of the fourth frame are not known."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for _ in range(6)]
    masks = np.zeros((2, 6, *SIZE), dtype=bool)
    masks[0, [0, 1, 2, 4, 5], 4:20, 4:20] = True
    masks[1, [2, 4, 5], 20:36, 24:44] = True
    return TrackedVideo("v", frames, masks, (0, 1, 2, 4, 5))


def test_given_masks_come_back_on_the_frames_they_are_given_on(model, video):
    labels = track_video(model, video)
    assert labels.shape == (6, *SIZE) and set(np.unique(labels[:2])) <= {0, 1}
    np.testing.assert_array_equal(labels[0] == 1, video.masks[0, 0])
    np.testing.assert_array_equal(labels[2] == 2, video.masks[1, 2])


def test_known_frames_after_an_objects_first_one_are_scored(model, video):
    labels = track_video(model, video)
    first, second = score_tracker(model, [video])
    for score, number, frames in ((first, 0, [1, 2, 4, 5]), (second, 1, [4, 5])):
        assert (score.video_id, score.object_number) == ("v", number)
        pairs = [(labels[idx] == number + 1, video.masks[number, idx]) for idx in frames]
        assert score.J == pytest.approx(np.mean([region_similarity(*pair) for pair in pairs]))
        assert score.F == pytest.approx(np.mean([boundary_f(*pair) for pair in pairs]))


def test_the_tracker_follows_as_at_inference(model, video):
    """Frame by frame through `step`, at the tracker's own size."""
    from visa_hf.modeling.video_tracking_visa import prepare_tracker_frame

    memory = model.init_memory()
    given = torch.from_numpy(video.masks)
    frames = [prepare_tracker_frame(frame, SIZE, "cpu", torch.float32) for frame in video.frames]
    model.step(memory, frames[0], given[:1, 0])
    expected = [model.step(memory, frames[1]).argmax(dim=0)]
    expected.append(model.step(memory, frames[2], given[1:, 2], [2]).argmax(dim=0))
    expected += [model.step(memory, frames[idx]).argmax(dim=0) for idx in (3, 4)]
    np.testing.assert_array_equal(track_video(model, video)[1:5], torch.stack(expected).numpy())


def test_frames_of_another_size_than_the_trackers_are_resized(video):
    torch.manual_seed(0)
    small = XMemModel(XMemConfig.tiny(input_size=32)).eval()
    assert track_video(small, video).shape == (6, *SIZE)


def test_a_model_in_training_stays_in_training_and_objects_of_the_last_frame_are_left_out(video):
    torch.manual_seed(0)
    training = XMemModel(XMemConfig.tiny(train_batch_norm=True)).train()
    before = {name: value.clone() for name, value in training.state_dict().items()}
    late = TrackedVideo("late", video.frames[:3], video.masks[:, :3], (0, 1, 2))
    assert [score.object_number for score in score_tracker(training, [late])] == [0]
    assert training.training
    assert all(torch.equal(value, before[name]) for name, value in training.state_dict().items())
