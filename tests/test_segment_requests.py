"""Requests about many videos: what is read from files and lists, and that all that is wrong with them is said."""

import json

import numpy as np
import pytest
from PIL import Image

from visa_hf.segment_requests import RequestsError, read_requests


@pytest.fixture
def place(tmp_path):
    """A folder with two videos, a folder of frames and a mask; nothing in them is looked at yet."""
    for name in ("clip.mp4", "Löwe 1.mp4"):
        (tmp_path / name).write_bytes(b"video")
    (tmp_path / "walk").mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "walk" / "1.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "mask.png")
    (tmp_path / "empty").mkdir()
    return tmp_path


def jsonl(place, *rows):
    path = place / "requests.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def csv_file(place, text, encoding="utf-8"):
    path = place / "requests.csv"
    path.write_bytes(text.encode(encoding))
    return path


def queries_of(requests):
    return [(request.video, [(query.expression_id, query.query) for query in request.queries]) for request in requests]


def test_rows_of_one_video_are_gathered_also_when_others_lie_between(place):
    path = jsonl(
        place,
        {"video": "clip.mp4", "query": "one"},
        {"video": "walk", "queries": ["two", "three"]},
        {"video": "./walk/../clip.mp4", "query": "four", "expression_id": "b 7", "target_frame": 3},
        {"video": str(place / "clip.mp4"), "query": "five", "reference_frames": [0, 9], "explain": True},
    )
    requests = read_requests(path)
    assert queries_of(requests) == [
        ("clip.mp4", [("0", "one"), ("b 7", "four"), ("2", "five")]),
        ("walk", [("0", "two"), ("1", "three")]),
    ]
    one, four, five = requests[0].queries
    assert (one.target_frame, one.explain, four.target_frame) == (None, False, 3)
    assert (five.reference_frames, five.explain) == ((0, 9), True)
    assert requests[0].path == place / "clip.mp4" and requests[0].place == "line 1"


def test_parts_of_a_video_are_videos_of_their_own(place):
    rows = [
        {"video": "clip.mp4", "query": "a", "start": 1},
        {"video": "clip.mp4", "query": "b", "start": "1.0"},
        {"video": "clip.mp4", "query": "c", "start": 1, "end": "90f"},
        {"video": "clip.mp4", "query": "d"},
    ]
    requests = read_requests(jsonl(place, *rows))
    assert [(request.start, request.end, len(request.queries)) for request in requests] == [
        (1.0, None, 2),
        (1.0, "90f", 1),
        (None, None, 1),
    ]


def test_csv_with_quotes_commas_a_mark_and_lines_of_windows(place):
    text = (
        "\ufeffvideo, query,target_frame,reference_frames,explain,start\r\n"
        'clip.mp4,"the cat, which says ""miau""\r\nto us\u2028all",5.0,"0,5 9",TRUE,\r\n'
        "\r\n"
        "Löwe 1.mp4, what is it?,,,,2.5\r\n"
        "clip.mp4,the dog,,,false,"
    )
    requests = read_requests(csv_file(place, text))
    assert queries_of(requests) == [
        ("clip.mp4", [("0", 'the cat, which says "miau"\r\nto us\u2028all'), ("1", "the dog")]),
        ("Löwe 1.mp4", [("0", "what is it?")]),
    ]
    cat = requests[0].queries[0]
    assert (cat.target_frame, cat.reference_frames, cat.explain) == (5, (0, 5, 9), True)
    assert requests[1].start == 2.5


def test_jsonl_with_a_mark_blank_lines_and_what_is_not_given(place):
    path = place / "requests.jsonl"
    row = '{"video": "clip.mp4", "query": "it\u2028was", "target_frame": null}'
    path.write_bytes(f"\ufeff\r\n{row}\r\n\r\n".encode())
    assert queries_of(read_requests(path)) == [("clip.mp4", [("0", "it\u2028was")])]


def test_a_list_holds_paths_and_numbers_of_tables(place, monkeypatch):
    monkeypatch.chdir(place)
    nan = float("nan")
    rows = [
        {"video": place / "clip.mp4", "query": "a", "target_frame": 5.0, "end": nan, "expression_id": np.int64(3)},
        {"video": "walk", "query": "b", "target_frame": np.int64(2), "fps": np.float32(2)},
    ]
    requests = read_requests(rows)
    assert requests[0].queries[0].target_frame == 5 and requests[0].end is None
    assert requests[0].queries[0].expression_id == "3"
    assert requests[1].queries[0].target_frame == 2 and requests[1].fps == 2.0


def test_defaults_are_for_rows_that_go_with_them(place):
    rows = [
        {"video": "clip.mp4", "query": "a"},
        {"video": "walk", "query": "b", "target_frame": 1, "explain": False},
        {"video": "walk", "first_mask": "mask.png"},
        {"video": "walk", "query": "c", "reference_frames": [1]},
    ]
    requests = read_requests(
        jsonl(place, *rows), target_frame=7, num_reference_frames=4, explain=True, start="2f", fps=5
    )
    (a,), (b, mask, c) = (request.queries for request in requests)
    assert (a.target_frame, a.num_reference_frames, a.explain) == (7, 4, True)
    assert (b.target_frame, b.num_reference_frames, b.explain) == (1, 4, False)
    assert (mask.target_frame, mask.num_reference_frames, mask.explain) == (None, None, False)
    assert mask.first_mask == place / "mask.png" and mask.query is None
    assert (c.target_frame, c.num_reference_frames, c.reference_frames) == (7, None, (1,))
    # A video file has a rate of its own.
    assert [(request.start, request.fps) for request in requests] == [("2f", None), ("2f", 5.0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "clip.mp4", "qurey": "it"}, "'qurey' is no column. Did you mean `query`?"),
        ({"video": "clip.mp4", "query": "it", "zzz": 1}, "'zzz' is no column. Known are video, query, queries, "),
        ({"query": "it"}, '`video` is missing. A row is like {"video": "clip.mp4", "query": "the red car"}.'),
        ({"video": "clip.mp4"}, "`query` is missing. Say what to segment."),
        ({"video": "clip.mp4", "query": " \t"}, "a query is empty (' \\t'). Say in words what is meant."),
        ({"video": "clip.mp4", "queries": ["a", ""]}, "a query is empty ('')."),
        ({"video": "clip.mp4", "queries": []}, "`queries` is [] but must be a list of texts."),
        ({"video": "clip.mp4", "queries": "it"}, "`queries` is 'it' but must be a list of texts."),
        ({"video": "clip.mp4", "query": 5}, "`query` is 5 but must be a text."),
        ({"video": "clip.mp4", "query": "\ud800"}, "`query` is '\\ud800' but must be a text."),
        ({"video": "clip.mp4", "query": "the [SEG]"}, "'the [SEG]' holds `[SEG]`, which the model reads as a special"),
        (
            {"video": "clip.mp4", "query": "a", "queries": ["b"]},
            "`query` and `queries` are both given. Leave one out.",
        ),
        (
            {"video": "clip.mp4", "queries": ["b"], "expression_id": "x"},
            "`expression_id` and `queries` are both given. It belongs to one query: write a row for each.",
        ),
        (
            {"video": "walk", "first_mask": "mask.png", "reference_frames": [0]},
            "`reference_frames` and `first_mask` are both given. With a mask the model is not asked",
        ),
        ({"video": "walk", "first_mask": "mask.png", "explain": True}, "`explain` and `first_mask` are both given."),
        (
            {"video": "clip.mp4", "query": "a", "reference_frames": [0], "num_reference_frames": 2},
            "`reference_frames` and `num_reference_frames` are both given. The number is for references",
        ),
        ({"video": "none.mp4", "query": "it"}, "there is no video at `{place}/none.mp4`."),
        ({"video": "empty", "query": "it"}, "The folder `{place}/empty` holds no images"),
        ({"video": "x" * 300, "query": "it"}, "File name too long"),
        ({"video": "", "query": "it"}, "`video` is '' but must be the path of a file or folder; download it first."),
        ({"video": "https://a.b/c.mp4", "query": "it"}, "`video` is 'https://a.b/c.mp4' but must be the path of a"),
        ({"video": "walk", "first_mask": "none.png"}, "There is no mask at `{place}/none.png`."),
        ({"video": "walk", "first_mask": "clip.mp4"}, "The mask `{place}/clip.mp4` is not an image that can be read."),
        ({"video": "clip.mp4", "query": "it", "fps": 5}, "`fps` is for folders and images; a video file has a"),
        ({"video": "clip.mp4", "query": "it", "start": 5, "end": "5"}, "`start` is 5 but `end` is 5. The end must"),
        ({"video": "clip.mp4", "query": "it", "target_frame": -1}, "`target_frame` is -1 but must be a whole number"),
        (
            {"video": "clip.mp4", "query": "it", "target_frame": 1.5},
            "`target_frame` is 1.5 but must be a whole number",
        ),
        ({"video": "clip.mp4", "query": "it", "target_frame": True}, "`target_frame` is True but must be a whole"),
        ({"video": "clip.mp4", "query": "it", "reference_frames": 3}, "`reference_frames` is 3 but must be a list of"),
        (
            {"video": "clip.mp4", "query": "it", "start": "soon"},
            "`start` is 'soon' but must be seconds, like 2.5, or a",
        ),
        ({"video": "clip.mp4", "query": "it", "end": -1}, "`end` is -1 but must be seconds"),
        ({"video": "walk", "query": "it", "fps": 0}, "`fps` is 0 but must be a number above 0."),
        ({"video": "clip.mp4", "query": "it", "explain": "yes"}, "`explain` is 'yes' but must be true or false."),
        (
            {"video": "clip.mp4", "query": "it", "expression_id": "../x"},
            "`expression_id` is '../x' but must be fit to",
        ),
        (
            {"video": "clip.mp4", "query": "it", "expression_id": "x" * 101},
            "but must be fit to name a folder: at most",
        ),
        ([1], "is [1] but must be an object, like"),
        ("text", "is 'text' but must be an object, like"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_line(place, row, message):
    path = jsonl(place, {"video": "clip.mp4", "query": "fine"})
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(RequestsError) as raised:
        read_requests(path)
    first, *lines = str(raised.value).splitlines()
    assert first.startswith(f"`{path}` has ") and " problem" in first
    assert any(line.startswith("  line 2: ") and message.replace("{place}", str(place)) in line for line in lines), (
        lines
    )


def test_all_that_is_wrong_is_listed_up_to_a_bound(place):
    rows = [{"video": f"{number}.mp4", "query": "it", "fsp": 1} for number in range(30)]
    with pytest.raises(RequestsError) as raised:
        read_requests(jsonl(place, *rows))
    lines = str(raised.value).splitlines()
    assert lines[0].endswith("has 60 problems:") and len(raised.value.messages) == 60
    assert len(lines) == 22 and lines[-1] == "  ... and 40 more"
    assert lines[1] == "  line 1: 'fsp' is no column. Did you mean `fps`?"
    assert "there is no video at" in lines[2]


def test_an_expression_id_is_given_once_in_a_video(place):
    rows = [
        {"video": "clip.mp4", "query": "a", "expression_id": "É"},
        {"video": "walk", "query": "a", "expression_id": "É"},
        {"video": "clip.mp4", "query": "b", "expression_id": "e\u0301"},
    ]
    with pytest.raises(RequestsError, match="line 3: the `expression_id` 'e\u0301' is that of another query .*line 1"):
        read_requests(jsonl(place, *rows))
    rows = [{"video": "walk", "query": "a", "expression_id": 1}, {"video": "walk", "query": "b"}]
    with pytest.raises(RequestsError, match="line 2: the `expression_id` '1' is that of another query on this video"):
        read_requests(jsonl(place, *rows))


def test_a_rate_belongs_to_a_video(place):
    rows = [{"video": "walk", "query": "a", "fps": 2}, {"video": "walk", "query": "b"}]
    with pytest.raises(RequestsError, match="line 2: `fps` is None but line 1, about the same video, has 2.0"):
        read_requests(jsonl(place, *rows))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"video": "clip.mp4", "query": it}', "line 1: is not valid JSON (Expecting value, at character 32)."),
        ('{"video": "clip.mp4", "video": "b"}', "line 1: is not valid JSON ('video' occurs twice)."),
        ("[" * 100_000, "line 1: is not valid JSON ("),
    ],
)
def test_a_line_that_is_no_json_is_named(place, line, message):
    path = place / "requests.jsonl"
    path.write_text(line + '\n{"video": "none.mp4", "query": "it"}\n')
    with pytest.raises(RequestsError) as raised:
        read_requests(path)
    assert message in str(raised.value) and "line 2: there is no video" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video;query\nclip.mp4;it\n", "line 1: the columns are separated by ';'. Separate them by commas."),
        ("video,qeury\nclip.mp4,it\n", "line 1: 'qeury' is no column. Did you mean `query`?"),
        ("video,queries\n", "line 1: `queries` is for JSONL. Give the column `query`, with a row for each."),
        ("video,query,query\n", "line 1: the column `query` occurs twice."),
        ("clip,query\n", "line 1: 'clip' is no column."),
        ("query\nit\n", "line 1: there is no column `video`. The first line names the columns, like: video,query"),
        ("video,query\nclip.mp4,it,too\n", "line 2: has 3 cells but there are 2 columns. Quote a text that holds"),
        ('video,query\n\nclip.mp4,"it\n', "line 3: is not valid CSV (unexpected end of data)."),
        ('video,query\nclip.mp4,"it" x\n', "line 2: is not valid CSV ("),
        ("video,query\nclip.mp4,\n", "line 2: `query` is missing."),
        ("video,query,target_frame\nclip.mp4,it,x\n", "line 2: `target_frame` is 'x' but must be a whole number"),
        ("video,query,explain\nclip.mp4,it,maybe\n", "line 2: `explain` is 'maybe' but must be true or false."),
        ('video,query\nclip.mp4,"a\nb"\nnone.mp4,it\n', "line 4: there is no video at"),
    ],
)
def test_what_is_wrong_in_a_csv_file_is_said_with_its_line(place, text, message):
    with pytest.raises(RequestsError) as raised:
        read_requests(csv_file(place, text))
    assert message in str(raised.value)


def test_files_that_are_none_are_refused(place):
    with pytest.raises(FileNotFoundError, match="There are no requests at `.*none.csv`"):
        read_requests(place / "none.csv")
    with pytest.raises(ValueError, match="are neither a .jsonl nor a .csv file"):
        read_requests(place / "clip.mp4")
    with pytest.raises(ValueError, match="line 2: is not UTF-8 text .* Save it as UTF-8"):
        read_requests(csv_file(place, "video,query\nLöwe 1.mp4,it\n", "latin-1"))
    with pytest.raises(ValueError, match="has no row. Give at least one video with a query"):
        read_requests(csv_file(place, "video,query\n"))
    with pytest.raises(ValueError, match="The list of requests has no row"):
        read_requests([])
    with pytest.raises(TypeError, match="`requests` is a dict but must be the path of a JSONL or CSV file, or a list"):
        read_requests({"video": "clip.mp4", "query": "it"})
    with pytest.raises(RequestsError, match="The list of requests has 1 problem:\n  row 0: `query` is missing"):
        read_requests([{"video": place / "clip.mp4"}])


def test_defaults_that_cannot_be_used_are_refused(place):
    rows = [{"video": str(place / "clip.mp4"), "query": "it"}]
    with pytest.raises(ValueError, match="^`start` is 'soon' but must be seconds"):
        read_requests(rows, start="soon")
    with pytest.raises(ValueError, match="^`reference_frames` and `num_reference_frames` are both given"):
        read_requests(rows, reference_frames=[1], num_reference_frames=2)
