"""The readers and checks at the border: streams against plain readers, pickles, paths, masks, fingerprints."""

import collections
import json
import os
import pickle
import pickletools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visa_hf.datasets_scripts import annotations, json_stream
from visa_hf.datasets_scripts.annotations import (
    AnnotationError,
    check_id,
    check_masks,
    check_relative,
    check_rle,
    check_text,
    fingerprint,
    iter_json_array,
    load_restricted_pickle,
    locate_json_items,
    locate_json_members,
    natural_key,
    read_json,
)
from visa_hf.datasets_scripts.mask_checks import all_fill
from visa_hf.rle import encode_mask, mask_area


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


VALUES = {
    "10": [None, {"size": [480, 854], "counts": 'a\\"[]{}`o0'}],
    "é\n": {"nested": [1, -2.5e3, True, "ü€"]},
    "": 123456,
    "last": [],
}


@pytest.fixture(params=[1, 3, 1 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Windows so small that everything is cut by them, and one that holds all."""
    monkeypatch.setattr(json_stream, "_CHUNK", request.param)
    return request.param


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_streaming_gives_what_json_gives_and_where_it_lies(
    tmp_path: Path, chunk: int, ascii_only: bool, end: bytes, mark: bytes
) -> None:
    def text(value: Any) -> bytes:
        return mark + json.dumps(value, ensure_ascii=ascii_only, indent=1).encode().replace(b"\n", end)

    items = list(VALUES.values())
    path = write(tmp_path / "a", text(VALUES))
    found = list(locate_json_items(path))
    assert {key: value for key, value, _ in found} == VALUES
    for key, _, (start, stop) in found:
        assert json.loads(path.read_bytes()[start:stop]) == VALUES[key]
    path = write(tmp_path / "b", text({"info": {"x": [2]}, "é": items, "none": [], "n": 3}))
    members = list(locate_json_members(path))
    assert [(key, value) for key, value, _ in members] == [
        ("é", None),
        *[("é", item) for item in items],
        ("none", None),
    ]
    for _, value, (start, stop) in members[1:-1]:
        assert json.loads(path.read_bytes()[start:stop]) == value
    assert list(iter_json_array(write(tmp_path / "c", text(items)))) == items


def test_empty_objects_and_arrays_have_no_items(tmp_path: Path, chunk: int) -> None:
    assert list(locate_json_items(write(tmp_path / "a", " {} \n"))) == []
    assert list(locate_json_members(write(tmp_path / "a", "{}"))) == []
    assert list(iter_json_array(write(tmp_path / "a", "[]"))) == []


BROKEN = [
    ("", "needed|JSON"),
    ("{", "JSON"),
    ('{"a": 1', "JSON"),
    ('{"a": 1,}', "JSON"),
    ('{"a" 1}', "JSON"),
    ('{"a": [1, 2}', "JSON"),
    ('{"a": 1} x', "JSON"),
    ('{"a": "open', "JSON"),
    ('{"a": tru}', "JSON"),
    ("{1: 2}", "JSON"),
    ('{"a": 1 "b": 2}', "JSON"),
    ("[1]", "holds no JSON object"),
    ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_broken_json_is_refused_with_the_file(tmp_path: Path, chunk: int, text: str, message: str) -> None:
    path = write(tmp_path / "bad.json", text)
    for read in (locate_json_items, locate_json_members):
        with pytest.raises(AnnotationError, match=f"bad.json: .*({message})"):
            list(read(path))


@pytest.mark.parametrize("text", ['{"a": [1]}', "[1, 2", "[1,]", "[1] 2", "[1 2]", "nothing"])
def test_broken_arrays_are_refused(tmp_path: Path, chunk: int, text: str) -> None:
    with pytest.raises(AnnotationError, match=r"bad.json: .*JSON"):
        list(iter_json_array(write(tmp_path / "bad.json", text)))


def test_one_key_written_in_two_ways_occurs_twice(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="the key 'é' occurs twice"):
        list(locate_json_items(write(tmp_path / "a.json", '{"é": 1, "\\u00e9": 2}')))


@pytest.mark.parametrize(
    ("value", "message"), [("[" * 300_000 + "]" * 300_000, "nested too deeply"), ("9" * 5000, "5000 digits")]
)
def test_values_made_to_break_a_reader_are_refused(tmp_path: Path, value: str, message: str) -> None:
    path = write(tmp_path / "a.json", f'{{"a": [{value}]}}')
    array = write(tmp_path / "b.json", f"[{value}]")
    for read in (
        read_json,
        lambda file: list(locate_json_items(file)),
        lambda file: list(locate_json_members(file)),
        lambda file: list(iter_json_array(array)),
    ):
        with pytest.raises(AnnotationError, match=message):
            read(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path, chunk: int) -> None:
    path = write(tmp_path / "a.json", b'{"a": ["\xff\xfe"]}')
    for read in (locate_json_items, locate_json_members, read_json):
        with pytest.raises(AnnotationError, match="a.json: is not UTF-8 text"):
            collections.deque(read(path), maxlen=0)


def test_values_larger_than_the_window_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", 64)
    value = {str(number): "x" * number for number in range(300)}
    assert [item[1] for item in locate_json_items(write(tmp_path / "a", json.dumps({"a": value})))] == [value]


def test_what_an_error_shows_is_short_and_quick() -> None:
    bomb: Any = ["lol"]
    for _ in range(60):
        bomb = [bomb, bomb]
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for value in (bomb, deep, {"a": bomb}, ["x"] * 10**6, "x" * 10**6, np.zeros(10**6), 10**5000, [10**5000]):
        with pytest.raises(AnnotationError) as caught:
            check_id([value], "anno_id", file="a.json", video="v" * 9999)
        assert len(str(caught.value)) < 700
    with pytest.raises(AnnotationError, match="`exp` is 12; text is needed"):
        check_text(12, "exp")


def test_read_json_tells_where(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="a.json, line 3: is not valid JSON"):
        read_json(write(tmp_path / "a.json", '{"a":\n 1,\n x}'))
    with pytest.raises(AnnotationError, match="the key 'b' occurs twice in the object at `a.1`"):
        read_json(write(tmp_path / "a.json", '{"a": [0, {"b": 1, "b": 2}]}'))
    with pytest.raises(AnnotationError, match="nested too deeply"):
        read_json(write(tmp_path / "a.json", "[" * 100_000))
    assert read_json(write(tmp_path / "a.json", "\ufeff[1]")) == [1]


def test_an_error_names_its_place() -> None:
    where: dict[str, Any] = {"line": 3, "video": "v", "expression": "0", "annotation": "7", "frame": "00001"}
    error = AnnotationError.at("is odd.", file="m.json", **where)
    assert str(error) == "m.json, line 3, video 'v', expression '0', annotation '7', frame '00001': is odd."
    assert str(AnnotationError.at("is odd.")) == "is odd."
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("path", ["a", "a/b.jpg", "a b/ü.png", "..a/b..", "clip.mp4#17", "./a"])
def test_paths_inside_the_folder_are_kept(path: str) -> None:
    assert check_relative(path) == path


OUTSIDE = ["", " ", ".", "/a", "//a/b", "../a", "a/../b", "a/..", "..", "C:/a", "c:a", "a\\b", "a\0b", "a\ud800"]


@pytest.mark.parametrize("path", [*OUTSIDE, None, 3, b"a"])
def test_paths_that_could_lead_outside_are_refused(path: Any) -> None:
    with pytest.raises(AnnotationError, match="f.json, video 'v': "):
        check_relative(path, file="f.json", video="v")


def test_ids_become_text() -> None:
    assert (check_id(7, "id"), check_id("7a", "id")) == ("7", "7a")
    for bad in (True, 1.0, None, "", [1]):
        with pytest.raises(AnnotationError, match="`id` is"):
            check_id(bad, "id")


def test_natural_order_counts() -> None:
    assert sorted(["f10", "f2", "f1a"], key=natural_key) == ["f1a", "f2", "f10"]
    assert sorted(["9" * 5000, "²", "10", "009", "a", ""], key=natural_key) == ["", "009", "10", "9" * 5000, "a", "²"]


MASK = np.zeros((5, 7), dtype=np.bool_)
MASK[1:3, 2:6] = True


def test_masks_become_plain_run_lengths() -> None:
    rle = encode_mask(MASK)
    published = {"counts": rle["counts"].encode(), "size": (5, 7), "area": 8}
    assert check_rle(published, 5, 7) == rle
    assert check_masks([published, None, rle], ["a", "b", "c"], 5, 7) == [rle, None, rle]
    assert check_masks([None], ["a"], 5, 7) == [None]


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [7, 5], "counts": "0"}, r"the mask has size \[7, 5\] \(H, W\), but the frame has \[5, 7\]"),
        ({"size": [5, 7], "counts": "1"}, "fill 1 pixels"),
        ({"size": [5, 7], "counts": [35]}, "`counts` are of type list"),
        ({"size": [5.0, 7], "counts": encode_mask(MASK)["counts"]}, "size"),
        ({"size": [5, 7]}, "a dict with `size` and `counts` is needed"),
        ("x", "the mask is 'x'"),
    ],
)
def test_wrong_masks_are_refused_with_the_frame(rle: Any, message: str) -> None:
    with pytest.raises(AnnotationError, match=f"m.json, video 'v', annotation '3', frame 'b': .*{message}"):
        check_masks([None, rle], ["a", "b"], 5, 7, file="m.json", video="v", annotation="3")


def _written(numbers: list[int]) -> str:
    """COCO's characters for numbers, by the definition of the format."""
    text = ""
    for number in numbers:
        while True:
            group, number = number & 0x1F, number >> 5
            is_last = number == (-1 if group & 0x10 else 0)
            text += chr(48 + (group if is_last else group | 0x20))
            if is_last:
                break
    return text


def test_runs_whose_sum_wraps_around_are_refused() -> None:
    """Together they have 2**64 pixels more than the frame, which 64 bits cannot tell from the right number."""
    step, half = 2**33, 2**15
    up_and_down = [step] * (2 * half) + [-step] * (2 * half)  # each run the difference to the one two before
    runs, numbers = [0, step, step], up_and_down[2:]
    for number in numbers:
        runs.append(runs[-2] + number)
    assert min(runs) >= 0 and sum(runs) == 2 * step * half**2 == 2**64
    rle = {"size": [5, 7], "counts": _written([35, step, step, *numbers])}
    assert not all_fill([rle], 5, 7)
    with pytest.raises(AnnotationError, match="m.json, video 'v', frame 'b': .*fill 18446744073709551616 pixels"):
        check_masks([None, rle], ["a", "b"], 5, 7, file="m.json", video="v")


def test_checking_many_masks_at_once_agrees_with_one_by_one() -> None:
    """Thousands of sound and damaged masks: the fast answer is that of the plain decoder."""
    numbers, rng = random.Random(0), np.random.default_rng(0)
    sound = [encode_mask(rng.random((9, 11)) < share) for share in (0, 0.1, 0.5, 0.9, 1)]
    sound.append(encode_mask(np.ones((9, 11), dtype=np.bool_)))

    def fills(rle: Any) -> bool:
        try:
            return bool(mask_area(rle) >= 0)
        except (TypeError, ValueError):
            return False

    num_sound = 0
    for _ in range(1200):
        rles: list[Any] = [dict(numbers.choice(sound)) for _ in range(numbers.randint(1, 4))]
        for rle in rles:
            if numbers.random() < 0.3:
                counts = list(rle["counts"])
                counts[numbers.randrange(len(counts))] = chr(numbers.randint(40, 120))
                rle["counts"] = "".join(counts[: numbers.choice([len(counts), -1])])
        expected = all(fills(rle) for rle in rles)
        num_sound += expected
        assert all_fill(rles, 9, 11) == expected, rles
    assert 300 < num_sound < 900
    assert not all_fill([{"size": [9, 11], "counts": "P" * 9 + "0"}], 9, 11)
    assert not all_fill([{"size": [9, 11], "counts": ""}], 9, 11)
    assert not all_fill([{"size": [True, 11], "counts": "0"}], 1, 11)


PLAIN = {
    "text": "ü",
    "bytes": b"\x00\xff",
    "numbers": [1, -(2**70), 2.5, True, None, 1j],
    "containers": ((1, 2), {3}, frozenset([4]), bytearray(b"5")),
    "ordered": collections.OrderedDict(a=1),
    "default": collections.defaultdict(list, a=[1]),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read(tmp_path: Path, protocol: int) -> None:
    assert load_restricted_pickle(write(tmp_path / "a", pickle.dumps(PLAIN, protocol))) == PLAIN


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">i4"),
        np.zeros((0, 2), dtype=np.bool_),
        np.array(["ab", "c"]),
        np.array([b"ab", b""]),
        np.array(5, dtype=np.int64),
        np.float32(0.5),
        np.int64(7),
    ],
)
def test_arrays_of_numbers_are_read(tmp_path: Path, array: Any, protocol: int) -> None:
    read = load_restricted_pickle(write(tmp_path / "a", pickle.dumps([array], protocol)))[0]
    np.testing.assert_array_equal(read, array)
    # numpy gives numbers of the other byte order in the machine's own
    assert np.asarray(read).dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    assert np.shape(read) == array.shape


def test_pickles_of_python_2_are_read(tmp_path: Path) -> None:
    """`pickle.dumps({'0': [None, {'counts': 'P1', 'size': [2, 3]}], u'a': 5L}, 2)` of Python 2."""
    text = b"\x80\x02}q\x00(U\x010q\x01]q\x02(N}q\x03(U\x06countsq\x04U\x02P1q\x05U\x04sizeq\x06]q\x07(K\x02K\x03euen"
    text = text.replace(b"euen", b"eue") + b"X\x01\x00\x00\x00aq\x08\x8a\x01\x05u."
    read = load_restricted_pickle(write(tmp_path / "a", text))
    assert read == {"0": [None, {"counts": "P1", "size": [2, 3]}], "a": 5}


class _Calls:
    """A pickle of this calls a function when it is loaded by the standard unpickler."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


HARMFUL: list[Callable[[str], Any]] = [
    lambda path: _Calls(os.mkdir, path),
    lambda path: _Calls(os.system, f"touch {path}"),
    lambda path: _Calls(eval, f"open({path!r}, 'w')"),
    lambda path: _Calls(exec, f"open({path!r}, 'w')"),
    lambda path: _Calls(open, path, "w"),
    lambda path: _Calls(getattr, Path(path), "mkdir"),
    lambda path: _Calls(np.save, path, np.zeros(1)),
    lambda path: {"masks": [1, {"deep": _Calls(os.mkdir, path)}]},
    lambda path: Path(path),
]


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("make", HARMFUL)
def test_pickles_with_code_are_refused_and_nothing_is_executed(
    tmp_path: Path, make: Callable[[str], Any], protocol: int
) -> None:
    harm = tmp_path / "harm"
    path = write(tmp_path / "bad.pkl", pickle.dumps(make(str(harm)), protocol))
    with pytest.raises(AnnotationError, match="bad.pkl: names .*nothing in it was executed"):
        load_restricted_pickle(path)
    assert not harm.exists()


def _state(dtype: str, dtype_state: bytes, array_state: bytes) -> bytes:
    """A pickle of an array by hand: `_reconstruct`, then its state with a dtype that has a state of its own."""
    dtype_text = b"cnumpy\ndtype\n(V" + dtype.encode() + b"\nI00\nI01\ntR" + dtype_state
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n"
    return array + array_state + dtype_text + b"I00\n"


CRAFTED: dict[str, bytes] = {
    "objects as bytes": _state("O8", b"(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb", b"(I1\nt") + b"S'AAAAAAAA'\ntb.",
    "too little data": _state("f8", b"(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb", b"(I1000000\nt") + b"S'A'\ntb.",
    "negative length": _state("f8", b"(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb", b"(I-1\nt") + b"S'A'\ntb.",
    "records": _state("f8", b"(I3\nS'<'\nN(S'a'\nt}I-1\nI-1\nI0\ntb", b"(I1\nt") + b"S'AAAAAAAA'\ntb.",
    "state of a class": b"ccollections\nOrderedDict\n}(S'pop'\nI1\nsb.",
    "no pickle": b"no pickle",
    "cut": pickle.dumps(PLAIN)[:-5],
    "empty": b"",
    "persistent": b"Pabc\n.",
    "stack": b"R.",
    "bytes by number": b"c__builtin__\nbytes\n(I1000000000000\ntR.",
    "bytes by a numpy number": b"c__builtin__\nbytearray\n(cnumpy._core.multiarray\nscalar\n"
    b"(cnumpy\ndtype\n(S'i8'\ntRS'AAAAAAAA'\ntRtR.",
    "empty strings by number": b"cnumpy._core.numeric\n_frombuffer\n"
    b"(C\x00cnumpy\ndtype\n(S'S0'\ntR(I1000000000000\ntS'C'\ntR.",
    "text of a list": b"c__builtin__\nunicode\n((lp0\ng0\natR.",
    "codec": b"c_codecs\nencode\n(Vabc\nVzlib_codec\ntR.",
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_and_damaged_pickles_are_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(AnnotationError, match="bad.pkl: "):
        load_restricted_pickle(write(tmp_path / "bad.pkl", CRAFTED[case]))


def test_the_crafted_pickles_are_whole() -> None:
    """They are refused for what they say, not for a slip in writing them."""
    for case in ("objects as bytes", "too little data", "negative length", "records", "codec"):
        operations = [operation.name for operation, _, _ in pickletools.genops(CRAFTED[case])]
        assert operations[-1] == "STOP" and ("BUILD" in operations or case == "codec")


def test_the_unpickler_is_not_changed_by_what_it_reads(tmp_path: Path) -> None:
    """A pickle may set attributes of what it was given; the next file must not see them."""
    attack = b"cnumpy.core.multiarray\n_reconstruct\n(N}S'__defaults__'\n(I1\ntstb."
    with pytest.raises(AnnotationError):
        load_restricted_pickle(write(tmp_path / "a", attack))
    array = np.arange(3)
    np.testing.assert_array_equal(load_restricted_pickle(write(tmp_path / "b", pickle.dumps(array))), array)


def test_a_fingerprint_sees_every_change(tmp_path: Path) -> None:
    (tmp_path / "pngs" / "v").mkdir(parents=True)
    file, deep, absent = tmp_path / "a.json", tmp_path / "pngs" / "v" / "0.png", tmp_path / "b.json"
    write(file, "1")
    write(deep, "1")

    def states() -> Iterator[str]:
        def now() -> str:
            return fingerprint([file, absent, tmp_path / "pngs"], root=tmp_path)

        yield now()
        stat = file.stat()
        write(file, "2")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        yield now()
        write(deep, "22")
        yield now()
        write(absent, "")
        yield now()
        deep.rename(deep.with_name("1.png"))
        yield now()
        file.unlink()
        yield now()

    found = list(states())
    assert len(set(found)) == len(found)
    assert fingerprint([file, absent, tmp_path / "pngs"], root=tmp_path) == found[-1]


def test_a_fingerprint_of_images_sees_their_coming_and_going(tmp_path: Path) -> None:
    (tmp_path / "images" / "v").mkdir(parents=True)
    empty = fingerprint([], root=tmp_path, image_folders=[tmp_path / "images"])
    write(tmp_path / "images" / "v" / "0.jpg", "1")
    full = fingerprint([], root=tmp_path, image_folders=[tmp_path / "images"])
    assert len({empty, full, fingerprint([], image_folders=[tmp_path / "nothing"])}) == 3


def test_a_fingerprint_looks_behind_links(tmp_path: Path) -> None:
    """Folders of frames are often links to another disk; one that leads back is no trap."""
    (tmp_path / "images").mkdir()
    (tmp_path / "disk" / "v").mkdir(parents=True)
    (tmp_path / "images" / "v").symlink_to(tmp_path / "disk" / "v")
    (tmp_path / "disk" / "v" / "back").symlink_to(tmp_path / "images")

    def state() -> str:
        return fingerprint([tmp_path / "images"], root=tmp_path, image_folders=[tmp_path / "images"])

    states = [state(), state()]
    write(tmp_path / "disk" / "v" / "0.jpg", "1")
    states.append(fingerprint([], root=tmp_path, image_folders=[tmp_path / "images"]))
    states += [state(), fingerprint([tmp_path / "images"], root=tmp_path)]
    write(tmp_path / "disk" / "v" / "0.jpg", "22")
    states.append(fingerprint([tmp_path / "images"], root=tmp_path))
    assert states[0] == states[1] and len(set(states)) == 5


def test_a_new_version_of_the_code_is_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint([tmp_path / "a"])
    monkeypatch.setattr(annotations, "_CODE_VERSION", "next")
    assert fingerprint([tmp_path / "a"]) != before
