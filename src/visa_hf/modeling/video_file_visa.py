"""Video files, through PyAV: which frames they have, and each of them decoded by its number.

The packets of a file are listed once; from then on a frame is known by its presentation time, so that B-frames, uneven
rates, late starts and edit lists need no care of their own. PyAV itself is imported by `frame_source_visa` and handed
in as `av`. What is decoded stays an `av.VideoFrame`: colours and rotation are up to `frame_source_visa`.
"""

import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# Codecs whose packets each hold one shown picture, and whose key frames can be decoded from. Others (VP8 has packets
# that show nothing, MPEG-2 may split a picture) are decoded once at opening to learn their frames.
_ONE_FRAME_PER_PACKET = frozenset(
    ("h264", "hevc", "av1", "libdav1d", "vp9", "mpeg4", "mjpeg", "png", "ffv1", "prores")
)
_SELF_CONTAINED_KEY_FRAMES = _ONE_FRAME_PER_PACKET | {"vp8", "mpeg1video", "mpeg2video", "rawvideo", "theora"}

# Decoding this many frames on costs about as much as a seek (benchmarks/frame_access.py).
_FRAMES_WORTH_A_SEEK = 8
_PROBED_FRAMES = 4
_MP4_BOXES = b"ftyp moov mdat free skip wide moof mfra sidx styp udta uuid".split()

USE_TRUNCATED = "Give `allow_truncated=True` (`--allow-truncated`) to use only the frames before the damage."


@dataclass(frozen=True)
class _Packet:
    """Times of one packet of the video stream, in ticks of its time base."""

    pts: int | None
    dts: int | None
    duration: int
    is_key: bool


@dataclass(frozen=True)
class VideoIndex:
    """What is known of a video file after its packets were listed.

    `times`: presentation times of the frames, ascending, in ticks; `None` if the file does not tell them apart: then
    frames can only be counted from the beginning. `damaged_time`: that of the packet at which to stop, as it cannot be
    decoded. `key_frames`: the indices from which decoding may start, ascending, 0 in front; `key_packets`: theirs.
    `timestamps`, `end_time`: when each frame appears and the last one goes, in seconds since the start of the file.
    """

    path: Path
    num_frames: int
    times: np.ndarray | None
    damaged_time: int | None
    key_frames: list[int]
    key_packets: list[_Packet]
    timestamps: list[float]
    end_time: float
    fps: Fraction | None
    has_audio: bool

    def group_start(self, index: int) -> int:
        """Index of the last key frame up to a frame."""
        return self.key_frames[bisect_right(self.key_frames, index) - 1]


@dataclass(frozen=True)
class _Listing:
    """What a file says of its video stream; `packets` in order of decoding, `first_times` of frames decoded."""

    packets: list[_Packet]
    first_times: list[int | None]
    is_whole: bool
    codec: str
    has_reordering: bool
    tick: Fraction
    start: int
    rate: Fraction | None
    has_audio: bool


def index_video(av: Any, path: Path, *, allow_truncated: bool) -> VideoIndex:
    """Find out which frames a video file has.

    Args:
        av: the module PyAV.
        path: the file.
        allow_truncated (`bool`): leave out the first damaged frame and all after it; the file is decoded to find it.

    Raises:
        ValueError: it is no video, has no frames, or is damaged; the first damaged frame is named.
    """
    listing = _list_packets(av, path)
    packets = listing.packets
    # 1) Do packets tell the frames?
    known = [packet.pts for packet in packets if packet.pts is not None]
    expected = sorted(known)
    is_listed = (
        listing.codec in _ONE_FRAME_PER_PACKET
        and packets[0].is_key
        and len(known) == len(packets) == len(set(known))
        and listing.first_times == expected[: len(listing.first_times)]
    )
    # 2) Where does the file break off? Packets that are missing could hold frames shown before the last ones there.
    num_doubtful = 0
    if not listing.is_whole:
        least = 2 if listing.has_reordering else 1 if listing.codec == "gif" else 0
        num_doubtful = max(_reordering_depth(known), least)
        if not allow_truncated:
            broken = max(len(packets) - num_doubtful, 0)
            raise ValueError(f"`{path}` is truncated or damaged: it breaks off at frame {broken}. {USE_TRUNCATED}")
    # 3) What does decoding say, where packets do not suffice?
    times: Sequence[int | None] = expected
    num_safe, damaged_time = len(packets) - num_doubtful, None
    if not is_listed or allow_truncated:
        decoded, broken_packet = _decode_times(av, path, stop_at_damage=allow_truncated)
        if not is_listed:
            times = decoded
            is_mixed_up = broken_packet is not None and listing.has_reordering
            num_safe = len(decoded) - max(num_doubtful, 2 if is_mixed_up else 0)
        elif broken_packet is not None and broken_packet < len(packets):
            # All frames decoded from the broken packet on may be spoilt, also those shown before its own.
            num_safe = min(num_safe, expected.index(min(known[broken_packet:])))
            damaged_time = known[broken_packet]
    if num_safe < 1:
        raise ValueError(f"`{path}` has no frames that can be used: it is damaged from the beginning.")
    # 4) When is each frame shown, and where can decoding start?
    shown = [time for time in times[:num_safe] if time is not None]
    is_identified = len(shown) == num_safe and all(a < b for a, b in zip(shown, shown[1:], strict=False))
    keys = {0: packets[0]}
    if not is_identified:
        step = round(1 / (listing.rate or 25) / listing.tick) or 1
        shown = [listing.start + index * step for index in range(num_safe)]
    elif listing.codec in _SELF_CONTAINED_KEY_FRAMES and len(known) == len(packets):
        place_of = {time: place for place, time in enumerate(shown)}
        for packet in packets:
            place = place_of.get(packet.pts or 0, 0) if packet.is_key else 0
            if place > 0:
                keys[place] = packet
    rate = _average_rate(listing.rate, shown, listing.tick)
    last = max(packets, key=lambda packet: -1 if packet.pts is None else packet.pts)
    last_duration = last.duration * listing.tick or (1 / rate if rate else 0)
    return VideoIndex(
        path=path,
        num_frames=num_safe,
        times=np.array(shown) if is_identified else None,
        damaged_time=damaged_time,
        key_frames=sorted(keys),
        key_packets=[keys[place] for place in sorted(keys)],
        timestamps=[float((time - listing.start) * listing.tick) for time in shown],
        end_time=float((shown[-1] - listing.start) * listing.tick + last_duration),
        fps=rate,
        has_audio=listing.has_audio,
    )


def _list_packets(av: Any, path: Path) -> _Listing:
    """List the intact packets that show a frame, and decode the first ones to see whether each holds one."""
    packets: list[_Packet] = []
    first_times: list[int | None] = []
    is_whole = is_decodable = True
    with _open_container(av, path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "SLICE"  # threads over frames would ask for more packets
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt and packet.size:
                    is_whole = False
                    break
                if packet.size and not packet.is_discard:
                    packets.append(_Packet(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe))
                if is_decodable and len(first_times) < _PROBED_FRAMES:
                    try:
                        first_times += [frame.pts for frame in packet.decode()]
                    except av.FFmpegError:  # damage: reading will name the frame
                        is_decodable = False
        except av.FFmpegError:
            is_whole = False
        # The index of an mp4 tells the number of frames: it does not matter if only what follows them is missing.
        has_all = "mp4" in container.format.name and 0 < stream.frames == len(packets)
        is_whole = is_whole and (has_all or not _is_cut_short(path))
        if not packets:
            reason = "its video stream is empty" if is_whole else "it breaks off before the first one"
            raise ValueError(f"`{path}` has no frames: {reason}.")
        return _Listing(
            packets=packets,
            first_times=first_times,
            is_whole=is_whole,
            codec=stream.codec_context.name,
            has_reordering=bool(stream.codec_context.has_b_frames),
            tick=stream.time_base,
            start=round(Fraction(container.start_time or 0, 1_000_000) / stream.time_base),
            rate=stream.average_rate or None,
            has_audio=len(container.streams.audio) > 0,
        )


def _reordering_depth(times: list[int]) -> int:
    """How many frames, at most, are decoded before a frame and shown after it."""
    places = np.argsort(np.argsort(times))
    return max((ordinal - int(place) for ordinal, place in enumerate(places)), default=0)


def _decode_times(av: Any, path: Path, *, stop_at_damage: bool) -> tuple[list[int | None], int | None]:
    """Decode a whole file: the times of its frames, and the ordinal of the packet at which it broke, if it did."""
    times: list[int | None] = []
    ordinals: dict[int | None, int] = {}
    count, broken, reason = 0, None, ""
    with _open_container(av, path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "SLICE"  # so that an error belongs to the packet just given
        try:
            for packet in container.demux(stream):
                is_shown = packet.size > 0 and not packet.is_discard
                if packet.size > 0 and packet.is_corrupt:
                    broken, reason = count, "its data is cut off"
                    break
                if is_shown:
                    ordinals[packet.pts] = count
                for frame in packet.decode():
                    if frame.is_corrupt:
                        broken, reason = ordinals.get(frame.pts, count), "its data is corrupt"
                        break
                    times.append(frame.pts)
                if broken is not None:
                    break
                count += is_shown
        except av.FFmpegError as error:
            broken, reason = count, str(error)
    if broken is not None and not stop_at_damage:
        raise ValueError(
            f"Frame {len(times)} of `{path}` is damaged and cannot be decoded ({reason}). {USE_TRUNCATED}"
        )
    return times, broken


class VideoDecoder:
    """One open container, which stands before some frame and reads on from there or jumps."""

    def __init__(self, av: Any, index: VideoIndex) -> None:
        self._av, self._index = av, index
        self._open(careful=False)

    def _open(self, careful: bool) -> None:
        self._container = _open_container(self._av, self._index.path)
        self._stream = _video_stream(self._container, self._index.path)
        # Threads over frames are the fastest; without them an error belongs to the packet just given.
        self._stream.thread_type = "SLICE" if careful else "AUTO"
        self._is_fresh, self._is_careful = True, careful
        self._frames: Iterator[tuple[int, Any]] = iter(())
        self._next: int | None = None  # the frame that comes next, if any was read
        self._error: Exception | None = None

    def close(self) -> None:
        """Close the file."""
        self._frames = iter(())
        self._container.close()

    def read(self, wanted: int) -> Any:
        """Return the decoded `av.VideoFrame` of an index."""
        key_frame = self._index.group_start(wanted)
        if self._next is not None and self._next <= wanted and key_frame <= self._next + _FRAMES_WORTH_A_SEEK:
            frame = self._advance(wanted)
            if frame is not None:
                return frame
        # A frame that cannot be decoded from its key frame is tried from the one before, then from the beginning:
        # some files call a frame a key frame that needs earlier ones.
        broken = 0
        key = bisect_left(self._index.key_frames, key_frame)
        for attempt, start in enumerate(dict.fromkeys((key, max(key - 1, 0), 0))):
            self._start_at(start, careful=attempt > 0)
            frame = self._advance(wanted)
            if frame is not None:
                return frame
            broken = max(broken, self._next or 0)
        reason = f" ({self._error})" if self._error else ""
        self._next = None
        raise ValueError(
            f"Frame {broken} of `{self._index.path}` is damaged and cannot be decoded{reason}. {USE_TRUNCATED}"
        )

    def _advance(self, wanted: int) -> Any | None:
        """Decode on to a frame; `None` if it, or one before it, is damaged or missing: then that is `_next`."""
        assert self._next is not None
        for index, frame in self._frames:
            if index < self._next:  # shown before the key frame at which decoding began
                continue
            if index != self._next or frame.is_corrupt:
                break
            self._next += 1
            if index == wanted:
                return frame
        return None

    def _start_at(self, key: int, careful: bool) -> None:
        if not self._is_fresh and (key == 0 or careful != self._is_careful):
            self._reopen(careful)
        packets = iter(self._container.demux(self._stream)) if key == 0 else self._packets_from(key)
        self._is_fresh = False
        self._frames = self._decode(packets)
        self._next, self._error = self._index.key_frames[key], None

    def _reopen(self, careful: bool) -> None:
        self._container.close()
        self._open(careful)

    def _packets_from(self, key: int) -> Iterator[Any]:
        """Jump to a key frame: the packets from exactly that one on."""
        target = self._index.key_packets[key]
        for time in (target.pts, target.dts):
            if time is None:
                continue
            try:
                self._container.seek(time, stream=self._stream, backward=True)
                found = _skip_to(self._container.demux(self._stream), target)
            except self._av.FFmpegError:
                continue
            if found is not None:
                return found
        self._reopen(self._is_careful)
        found = _skip_to(self._container.demux(self._stream), target)
        if found is None:
            raise ValueError(f"`{self._index.path}` has changed while it was being read. Open it again.")
        return found

    def _decode(self, packets: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """Yield `(index, frame)` in order of presentation; index -1 for frames that are not part of the video."""
        times, count = self._index.times, 0
        for frame in self._decode_until_damage(packets):
            if times is None:
                yield count, frame
            else:
                place = int(np.searchsorted(times, frame.pts))
                yield (place if place < len(times) and times[place] == frame.pts else -1), frame
            count += 1

    def _decode_until_damage(self, packets: Iterator[Any]) -> Iterator[Any]:
        try:
            for packet in packets:
                if packet.is_corrupt or (packet.pts is not None and packet.pts == self._index.damaged_time):
                    break
                yield from packet.decode()
            else:
                return
        except self._av.FFmpegError as error:
            self._error = error
        # Frames that wait inside the decoder for their turn come from before the damage.
        try:
            yield from self._stream.codec_context.decode(None)
        except self._av.FFmpegError as error:
            self._error = error


def _open_container(av: Any, path: Path) -> Any:
    try:
        return av.open(str(path), metadata_errors="ignore")
    except av.FFmpegError as error:
        if isinstance(error, PermissionError):
            raise
        if path.stat().st_size == 0:
            reason = "it is empty (0 bytes)"
        elif _is_cut_short(path, require_index=True):
            reason = (
                "it is truncated, and the index (moov) without which nothing of it can be read is missing. "
                "`allow_truncated` cannot help; get the whole file"
            )
        else:
            reason = f"it is not a video in a known format ({error.strerror})"
        raise ValueError(f"`{path}` cannot be opened: {reason}.") from error


def _video_stream(container: Any, path: Path) -> Any:
    """The main video stream; pictures attached to sound files do not count."""
    moving = [s for s in container.streams.video if not s.disposition & type(s.disposition).attached_pic]
    best = container.streams.best("video")
    if not moving:
        raise ValueError(f"`{path}` has no frames: there is no video stream in it.")
    stream = best if best in moving else moving[0]
    if stream.codec_context is None:
        raise ValueError(f"`{path}` holds video in a codec that the installed PyAV cannot decode. Convert it first.")
    return stream


def _average_rate(stated: Fraction | None, times: list[int], tick: Fraction) -> Fraction | None:
    """The rate that a file states if its frames keep to it, else their true average; `None` for a single frame."""
    if len(times) < 2:
        return stated
    measured = (len(times) - 1) / ((times[-1] - times[0]) * tick)
    return stated if stated and abs(stated / measured - 1) < 0.01 else measured


def _skip_to(packets: Iterator[Any], target: _Packet) -> Iterator[Any] | None:
    """The packets from `target` on, or `None` if they begin after it."""
    for packet in packets:
        if packet.size and packet.pts == target.pts:
            return chain([packet], packets)
        if packet.dts is not None and target.dts is not None and packet.dts > target.dts:
            return None
    return None


def _is_cut_short(path: Path, *, require_index: bool = False) -> bool:
    """Whether a file ends before the end that its own headers announce (mp4 and mov, mkv and webm, avi, gif).

    With `require_index`, also whether it is an mp4 or mov file without an index.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[4:8] in _MP4_BOXES:
            end, has_index = _mp4_end(file)
            return end > size or (require_index and not has_index)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _matroska_end(file) > size
        if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            return struct.unpack("<I", head[4:8])[0] + 8 > size
        if head[:3] == b"GIF":
            file.seek(-min(size, 16), os.SEEK_END)
            return not file.read().rstrip(b"\0").endswith(b";")  # ";" closes a GIF
    return False


def _mp4_end(file: BinaryIO) -> tuple[int, bool]:
    """Where the last box of an mp4 file should end, and whether there is an index (`moov`) among the boxes."""
    offset, has_index = 0, False
    while True:
        file.seek(offset)
        head = file.read(16)
        if len(head) < 8 or head[4:8] not in _MP4_BOXES:
            return offset, has_index
        length = struct.unpack(">I", head[:4])[0]
        if length == 1 and len(head) == 16:  # a 64-bit length follows the name
            length = struct.unpack(">Q", head[8:])[0]
        if length < 8:  # 0: this box reaches to the end, wherever that is
            return offset, has_index or head[4:8] == b"moov"
        has_index |= head[4:8] == b"moov"
        offset += length


def _matroska_end(file: BinaryIO) -> int:
    """Where the segment of an mkv or webm file should end; 0 if it was written without a length, as live ones are."""
    file.seek(4)
    header_length = _read_ebml_length(file)
    if header_length is None:
        return 0
    file.seek(header_length, os.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return 0
    length = _read_ebml_length(file)
    return 0 if length is None else file.tell() + length


def _read_ebml_length(file: BinaryIO) -> int | None:
    """Read a number whose first byte tells, by its leading zero bits, how many bytes follow; all ones: unknown."""
    start = file.read(1)
    if not start:
        return None
    first = start[0]
    extra = 8 - first.bit_length()
    value = int.from_bytes(bytes([first & (0x7F >> extra)]) + file.read(extra), "big")
    return None if value == (1 << 7 * (extra + 1)) - 1 else value
