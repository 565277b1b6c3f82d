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
    fingerprint,
    iter_json_array,
    iter_json_items,
    iter_json_lines,
    load_restricted_pickle,
    locate_json_items,
    natural_key,
    read_json,
)
from visa_hf.datasets_scripts.mask_checks import all_fill
from visa_hf.rle import encode_mask, mask_area


@pytest.fixture(params=["ijson", "plain"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of streaming, the plain one with a window so small that everything is cut by it."""
    if request.param == "ijson":
        pytest.importorskip("ijson")
    else:
        monkeypatch.setattr(json_stream, "find_spec", lambda name: None)
        monkeypatch.setattr(json_stream, "_CHUNK", 3)
    return request.param


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


VALUES = {
    "10": [None, {"size": [480, 854], "counts": 'a\\"[]{}`o0'}],
    "é\n": {"nested": [1, -2.5e3, True, "ü€"]},
    "": 123456,
    "last": [],
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_streaming_gives_what_json_gives(tmp_path: Path, reader: str, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(VALUES, indent=indent, ensure_ascii=ascii_only)
    assert dict(iter_json_items(write(tmp_path / "a.json", text))) == VALUES
    wrapped = json.dumps({"info": [1, {"x": 2}], "videos": {"deep": VALUES}, "more": 0}, ensure_ascii=ascii_only)
    assert dict(iter_json_items(write(tmp_path / "b.json", wrapped), "videos.deep")) == VALUES
    items = list(VALUES.values())
    assert list(iter_json_array(write(tmp_path / "c.json", json.dumps(items, indent=indent)))) == items


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_located_bytes_hold_the_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, ascii_only: bool
) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    text = json.dumps(VALUES, ensure_ascii=ascii_only, indent=1).encode()
    for path in (write(tmp_path / "a", text), write(tmp_path / "b", text.replace(b"\n", b"\r\n"))):
        found = list(locate_json_items(path))
        assert [key for key, _, _ in found] == list(VALUES)
        for key, _, (start, end) in found:
            assert json.loads(path.read_bytes()[start:end]) == VALUES[key]


def test_empty_objects_and_arrays_have_no_items(tmp_path: Path, reader: str) -> None:
    assert list(iter_json_items(write(tmp_path / "a", " {} \n"))) == []
    assert list(iter_json_items(write(tmp_path / "a", '{"videos": {}}'), "videos")) == []
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
def test_broken_json_is_refused_with_the_file(tmp_path: Path, reader: str, text: str, message: str) -> None:
    path = write(tmp_path / "bad.json", text)
    for read in (iter_json_items, locate_json_items):
        with pytest.raises(AnnotationError, match=f"bad.json: .*({message})"):
            list(read(path))


@pytest.mark.parametrize("text", ['{"a": [1]}', "[1, 2", "[1,]", "[1] 2", "[1 2]", "nothing"])
def test_broken_arrays_are_refused(tmp_path: Path, reader: str, text: str) -> None:
    with pytest.raises(AnnotationError, match=r"bad.json: .*JSON"):
        list(iter_json_array(write(tmp_path / "bad.json", text)))


def test_a_missing_place_is_refused(tmp_path: Path, reader: str) -> None:
    path = write(tmp_path / "a.json", '{"images": {"x": 1}, "videos": [1]}')
    with pytest.raises(AnnotationError, match="has no `annotations`"):
        list(iter_json_items(path, "annotations"))
    with pytest.raises(AnnotationError, match="holds no JSON object at `videos`"):
        list(iter_json_items(path, "videos"))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path, reader: str) -> None:
    path = write(tmp_path / "a.json", b'{"a": "\xff\xfe"}')
    for read in (iter_json_items, read_json):
        with pytest.raises(AnnotationError, match="a.json: "):
            collections.deque(read(path), maxlen=0)
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n"\xff"\n')
    with pytest.raises(AnnotationError, match="a.jsonl, line 2: is not UTF-8"):
        list(iter_json_lines(path))


def test_values_larger_than_the_window_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "find_spec", lambda name: None)
    monkeypatch.setattr(json_stream, "_CHUNK", 64)
    value = {str(number): "x" * number for number in range(300)}
    assert dict(iter_json_items(write(tmp_path / "a", json.dumps({"a": value})))) == {"a": value}


def test_read_json_tells_where(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="a.json, line 3: is not valid JSON"):
        read_json(write(tmp_path / "a.json", '{"a":\n 1,\n x}'))
    with pytest.raises(AnnotationError, match="the key 'b' occurs twice in the object at `a.1`"):
        read_json(write(tmp_path / "a.json", '{"a": [0, {"b": 1, "b": 2}]}'))
    with pytest.raises(AnnotationError, match="nested too deeply"):
        read_json(write(tmp_path / "a.json", "[" * 100_000))
    assert read_json(write(tmp_path / "a.json", "\ufeff[1]")) == [1]


def test_json_lines_have_numbers(tmp_path: Path) -> None:
    assert list(iter_json_lines(write(tmp_path / "a", '{"a": 1}\r\n\n "b\u2028c" \n[]'))) == [
        (1, {"a": 1}),
        (3, "b\u2028c"),
        (4, []),
    ]
    with pytest.raises(AnnotationError, match="a.jsonl, line 2: is not valid JSON"):
        list(iter_json_lines(write(tmp_path / "a.jsonl", "1\n{\n")))
    with pytest.raises(AnnotationError, match="line 1: the key 'a' occurs twice"):
        list(iter_json_lines(write(tmp_path / "a.jsonl", '{"a": 1, "a": 1}')))


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


def test_a_new_version_of_the_code_is_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint([tmp_path / "a"])
    monkeypatch.setattr(annotations, "_CODE_VERSION", "next")
    assert fingerprint([tmp_path / "a"]) != before
