"""Conversation data on small trees in the published layouts, with the oddities of the real files."""

import json
import re
from fractions import Fraction

import av
import pytest
from PIL import Image

from tests.datasets_scripts.prepared import prepared, refused
from tests.media import cut_off, cut_with_edit_list, write_constant_rate, write_gif, write_variable_rate, write_video
from visa_hf.datasets_scripts.annotations import AnnotationError
from visa_hf.datasets_scripts.chat_univi_instruct import ChatUniViInstruct, spread_frames, video_length
from visa_hf.datasets_scripts.conversations import read_turns
from visa_hf.datasets_scripts.llava_instruct import LLaVAInstruct
from visa_hf.modeling.frame_source_visa import open_frames


def say(*texts, first="human"):
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": speakers[number % 2], "value": text} for number, text in enumerate(texts)]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def save_image(path, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


# Turns


def test_marks_of_pictures_go_and_the_words_around_them_stay():
    turns = read_turns(say("<image>\nWhat is it?", " A dog. ", "Look at <image> and <video>\nsay more", "No\nmore."))
    assert turns == [
        {"question": "What is it?", "answer": "A dog."},
        {"question": "Look at and say more", "answer": "No\nmore."},
    ]


def test_an_opening_answer_is_dropped_only_where_that_is_known_to_occur():
    conversation = say("Hello!", "What?", "This.", first="gpt")
    assert read_turns(conversation, may_open_with_answer=True) == [{"question": "What?", "answer": "This."}]
    with pytest.raises(AnnotationError, match=r"the 3 messages are from \['gpt', 'human', 'gpt'\]; \"human\" and"):
        read_turns(conversation)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (None, "`conversations` is no list of messages"),
        (["hello"], "`conversations` is no list of messages"),
        ([], r"the 0 messages are from \[\]"),
        (say("a"), r"the 1 messages are from \['human'\]"),
        (say("a", "b", "c"), 'must take turns, "gpt" comes last'),
        ([*say("a", "b"), *say("c", "d", first="gpt")], "the 4 messages are from"),
        (say("a", "b") + [{"from": "system", "value": "c"}], "'system'"),
        (say("<image>", "b"), "message 0 is '<image>'; text is needed"),
        (say("a", " \n"), "message 1 is "),
        (say("a", None), "message 1 is None"),
        (say("a", "see [SEG] </s>"), r"message 1 holds \[SEG\], </s>, which the model reads as a special token"),
    ],
)
def test_a_conversation_of_another_form_is_refused(conversation, message):
    with pytest.raises(AnnotationError, match=message) as caught:
        read_turns(conversation, file="chat.json", annotation="7")
    assert str(caught.value).startswith("chat.json, annotation '7': ")


# LLaVA-Instruct


@pytest.fixture
def llava(tmp_path):
    for name in ("000000000009", "000000000025"):
        save_image(tmp_path / "coco" / "train2017" / f"{name}.jpg")
    return tmp_path


LLAVA = "llava_dataset/llava_instruct_150k.json"


def llava_item(name="000000000009", conversations=None):
    return {"id": name, "image": f"{name}.jpg", "conversations": conversations or say("What?\n<image>", "A dog.")}


def test_llava_rows_hold_all_rounds_of_every_conversation(llava, tmp_path):
    items = [
        llava_item(conversations=say("<image>\nWho?", "He.", "Where?", "There.")),
        llava_item("000000000025"),
        llava_item(),  # several conversations about one image are usual
    ]
    write_json(llava / LLAVA, items)
    rows = prepared(LLaVAInstruct, None, llava, tmp_path / "cache")
    assert rows[0] == {
        "dataset": "llava_instruct",
        "video_id": "000000000009",
        "conversation_id": "0",
        "frames": ["coco/train2017/000000000009.jpg"],
        "turns": [{"question": "Who?", "answer": "He."}, {"question": "Where?", "answer": "There."}],
    }
    assert rows["video_id"] == ["000000000009", "000000000025", "000000000009"]
    assert rows["conversation_id"] == ["0", "1", "2"]
    streamed = LLaVAInstruct(data_dir=llava, cache_dir=tmp_path / "cache").as_streaming_dataset("train")
    assert list(streamed) == list(rows)
    write_json(llava / LLAVA, items[:1])
    assert len(prepared(LLaVAInstruct, None, llava, tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("x", "annotation '1': the item has no `image`"),
        ({"conversations": say("a", "b")}, "the item has no `image`"),
        (llava_item("missing"), "there is no file `coco/train2017/missing.jpg`. Complete the folder"),
        (llava_item("../../secret"), "the path '../../secret.jpg' is refused"),
        (llava_item(conversations=say("a")), "video '000000000009.jpg', annotation '1': the 1 messages"),
    ],
)
def test_a_llava_item_that_is_wrong_is_named_or_skipped(item, message, llava, tmp_path, caplog):
    write_json(llava / LLAVA, [llava_item(), item, llava_item("000000000025")])
    with refused(message):
        prepared(LLaVAInstruct, None, llava, tmp_path / "cache")
    rows = prepared(LLaVAInstruct, None, llava, tmp_path / "cache", on_error="skip")
    assert rows["conversation_id"] == ["0", "2"]
    assert "1 rows were left out" in caplog.text


def test_broken_or_missing_files_of_llava_are_named(llava, tmp_path):
    with pytest.raises(FileNotFoundError, match="llava_instruct_150k.json not found in"):
        prepared(LLaVAInstruct, None, llava, tmp_path / "cache")
    (llava / "llava_dataset").mkdir()
    (llava / LLAVA).write_text('[{"id": 1}')
    with refused("llava_instruct_150k.json"):
        prepared(LLaVAInstruct, None, llava, tmp_path / "cache", on_error="skip")


# Chat-UniVi-Instruct

MIMIC = "Fine-tuning/MIMIC_imageonly"


@pytest.fixture
def chat_univi(tmp_path):
    """The three parts: an image of each kind of MIMIC-IT, a pair, ScienceQA with and without image, a video."""
    save_image(tmp_path / MIMIC / "CDG" / "images" / "CGD_IMG_1.png")
    save_image(tmp_path / MIMIC / "CDG" / "images" / "CGD_IMG_2.png", (4, 9))
    save_image(tmp_path / MIMIC / "LA" / "images" / "LA_IMG_1.png")
    save_image(tmp_path / MIMIC / "SD" / "SD_IMG_1.png")  # unpacked without `images`
    write_json(
        tmp_path / MIMIC / "MIMIC-IT-imageonly.json",
        [
            {"id": "a", "image": ["CGD_IMG_1.png", "CGD_IMG_2.png"], "conversations": say("<image>\n<image>\nx", "y")},
            {"id": "b", "image": "LA_IMG_1.png", "conversations": say("Hi", "x\n<image>", "y", first="gpt")},
            {"id": "c", "image": ["SD_IMG_1.png"], "conversations": say("x", "y", "z", "w")},
        ],
    )
    save_image(tmp_path / "ScienceQA_tuning" / "train" / "1" / "image.png")
    write_json(
        tmp_path / "ScienceQA_tuning" / "llava_train_QCM-LEA.json",
        [
            {"id": "1", "image": "1\\image.png", "conversations": say("<image>\nx", "y")},
            {"id": "2", "conversations": say("x", "y")},
        ],
    )
    videos = tmp_path / "Fine-tuning" / "VIDEO" / "Activity_Videos"
    videos.mkdir(parents=True)
    write_video(videos / "v_1.mp4", 26, fps=5)
    write_json(
        videos.parent / "video_chat.json",
        [
            {"id": "v_1", "video": "v_1.mp4", "conversations": say("x\n<video>", "y")},
            {"id": "v_1", "video": "v_1.mp4", "conversations": say("more", "y")},
        ],
    )
    return tmp_path


def test_chat_univi_names_images_pairs_and_one_video_frame_a_second(chat_univi, tmp_path):
    cache = tmp_path / "cache"
    rows = prepared(ChatUniViInstruct, None, chat_univi, cache)
    assert rows["conversation_id"] == [
        *("mimic_0", "mimic_1", "mimic_2"),
        *("scienceqa_0", "scienceqa_1"),
        *("video_0", "video_1"),
    ]
    clip = "Fine-tuning/VIDEO/Activity_Videos/v_1.mp4"
    assert rows["frames"] == [
        [f"{MIMIC}/CDG/images/CGD_IMG_1.png", f"{MIMIC}/CDG/images/CGD_IMG_2.png"],
        [f"{MIMIC}/LA/images/LA_IMG_1.png"],
        [f"{MIMIC}/SD/SD_IMG_1.png"],
        ["ScienceQA_tuning/train/1/image.png"],
        [],
        *[[f"{clip}#{index}" for index in (0, 5, 10, 15, 20, 25)]] * 2,
    ]
    assert rows["video_id"][3:6] == ["ScienceQA_tuning/train/1/image", "2", "v_1"]
    assert rows["turns"][:3] == [
        [{"question": "x", "answer": "y"}],
        [{"question": "x", "answer": "y"}],
        [{"question": "x", "answer": "y"}, {"question": "z", "answer": "w"}],
    ]
    for config, start, stop in (("mimic", 0, 3), ("scienceqa", 3, 5), ("video", 5, 7)):
        assert list(prepared(ChatUniViInstruct, config, chat_univi, cache)) == list(rows)[start:stop]
    few = prepared(ChatUniViInstruct, "video", chat_univi, cache, max_frames=3)
    assert few[0]["frames"] == [f"{clip}#{index}" for index in (0, 10, 25)]


def test_one_part_alone_needs_no_other(chat_univi, tmp_path):
    (chat_univi / MIMIC / "MIMIC-IT-imageonly.json").unlink()
    assert len(prepared(ChatUniViInstruct, "scienceqa", chat_univi, tmp_path / "cache")) == 2
    with pytest.raises(FileNotFoundError, match="MIMIC-IT-imageonly.json not found"):
        prepared(ChatUniViInstruct, None, chat_univi, tmp_path / "cache")


@pytest.mark.parametrize(
    ("part", "item", "message"),
    [
        ("mimic", {"id": "x", "conversations": say("a", "b")}, "`image` is None; the name of a file, or a list"),
        ("mimic", {"image": [], "conversations": say("a", "b")}, r"`image` is \[\]; the name of a file"),
        ("mimic", {"image": "XY_1.png", "conversations": say("a", "b")}, "names none of the parts CGD, LA and SD"),
        ("mimic", {"image": "LA_9.png", "conversations": say("a", "b")}, "there is no file `.*LA/images/LA_9.png`"),
        ("mimic", {"image": "..\\LA_9.png", "conversations": say("a", "b")}, "is refused"),
        ("mimic", [], "the item is no object"),
        ("video", {"video": "v_2.mp4", "conversations": say("a", "b")}, "there is no file `.*v_2.mp4`"),
        ("video", {"video": "v_bad.mp4", "conversations": say("a", "b")}, "v_bad.mp4` cannot be opened"),
        ("video", {"video": "v_cut.mp4", "conversations": say("a", "b")}, "v_cut.mp4` is truncated"),
        ("video", {"conversations": say("a", "b")}, "the path None is not text"),
        ("scienceqa", {"conversations": say("a", "b")}, "`id` is None"),
    ],
)
def test_a_chat_univi_item_that_is_wrong_is_named(part, item, message, chat_univi, tmp_path):
    videos = chat_univi / "Fine-tuning" / "VIDEO" / "Activity_Videos"
    (videos / "v_bad.mp4").write_text("no video")
    container = write_video(tmp_path / "whole.mp4", 60, container_options={"movflags": "+faststart"})
    cut_off(container, videos / "v_cut.mp4", 0.7)
    files = {
        "mimic": chat_univi / MIMIC / "MIMIC-IT-imageonly.json",
        "video": videos.parent / "video_chat.json",
        "scienceqa": chat_univi / "ScienceQA_tuning" / "llava_train_QCM-LEA.json",
    }
    write_json(files[part], [item])
    with refused(f"^{re.escape(str(files[part]))}, annotation '0'(, .*)?: .*{message}"):
        prepared(ChatUniViInstruct, part, chat_univi, tmp_path / "cache")


def test_a_wrong_number_of_frames_is_refused(chat_univi):
    with pytest.raises(ValueError, match="`max_frames` is 0; a number of frames from 1 on is needed"):
        ChatUniViInstruct("video", data_dir=chat_univi, max_frames=0)


def test_the_length_of_a_video_is_that_of_open_frames(tmp_path):
    paths = [
        write_video(tmp_path / "a.mp4", 50),
        write_constant_rate(tmp_path / "b.mp4", 60),
        write_variable_rate(tmp_path / "c.mkv")[0],
        write_gif(tmp_path / "d.gif"),
        write_video(tmp_path / "e.webm", 30, codec="libvpx"),
        write_video(tmp_path / "f.avi", 30, codec="mpeg4"),
        write_video(tmp_path / "g.mov", 30, codec="mjpeg", pix_fmt="yuvj420p"),
    ]
    paths.append(cut_with_edit_list(paths[1], tmp_path / "h.mp4", 512 * 5))
    for path in paths:
        with open_frames(path) as source:
            assert video_length(path)[0] == source.num_frames, path.name
    assert video_length(paths[-1])[0] == 55  # five frames lie before the edit list begins


def test_an_mp4_is_counted_without_reading_its_frames(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 50)
    monkeypatch.setattr("visa_hf.datasets_scripts.chat_univi_instruct.open_frames", None)
    assert video_length(path) == (50, Fraction(25))
    with pytest.raises(TypeError, match="NoneType"):  # another container has no such index
        video_length(write_variable_rate(tmp_path / "c.mkv")[0])
    assert av.open(str(path)).streams.video[0].frames == 50


@pytest.mark.parametrize(
    ("num_frames", "fps", "max_frames", "expected"),
    [
        (1, Fraction(25), 64, [0]),
        (26, Fraction(25), 64, [0, 25]),
        (90, Fraction(30000, 1001), 64, [0, 30, 60]),
        (5, None, 64, [0, 1, 2, 3, 4]),
        (5, Fraction(1, 4), 64, [0, 1, 2, 3, 4]),
        (100, Fraction(10), 4, [0, 30, 60, 90]),
        (100, Fraction(10), 1, [0]),
    ],
)
def test_frames_are_spread_over_the_seconds(num_frames, fps, max_frames, expected):
    assert spread_frames(num_frames, fps, max_frames) == expected
