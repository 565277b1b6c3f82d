"""What a benchmark asks, what is true about it, and how its scores are put together.

An `EvaluationSet` holds the expressions of one split, the true masks and the foregrounds, from the builders of
`visa_hf.datasets_scripts` or from plain rows. The protocols are those of the VISA paper (arXiv 2407.11325) and of the
sets' own authors. Nothing is predicted or scored here.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ..rle import RLE

FrameMasks = list[RLE | None]

# How a table is made: ReVOS' by type of expression, one mean, Ref-DAVIS' by annotator, or cIoU and gIoU of images.
Summary = Literal["types", "mean", "annotators", "images"]

NUM_ANNOTATORS = 4  # Ref-DAVIS17: each object is described four times (Khoreva et al., ACCV 2018)


@dataclass(frozen=True)
class Benchmark:
    """How one data set is evaluated.

    Args:
        name (`str`): as given to `--dataset`.
        builder (`str`): class in `visa_hf.datasets_scripts`.
        splits (`tuple[str, ...]`): names of its splits; empty if any name may be one.
        server_splits (`tuple[str, ...]`): splits without public masks, scored by the authors' server from a zip.
        zip_folder (`str`): folder of the zip that the videos' folders are in; empty if they are at its top.
        summary (`str`): how the table is made.
        configs (`dict[str, str]`): the builder's configuration for `"expressions"`, `"masks"` and `"videos"` (the
            foreground of each video), as far as it has them.
        first_only (`bool`): only the first expression of each image counts, as in LISA's evaluation of ReasonSeg.
    """

    name: str
    builder: str
    splits: tuple[str, ...] = ()
    server_splits: tuple[str, ...] = ()
    zip_folder: str = ""
    summary: Summary = "mean"
    configs: Mapping[str, str] = field(default_factory=lambda: {"expressions": "expressions", "masks": "masks"})
    first_only: bool = False

    @property
    def is_image_set(self) -> bool:
        """Whether every "video" is a single image, scored by cIoU and gIoU."""
        return self.summary == "images"


@dataclass(frozen=True)
class Expression:
    """One expression about one video.

    Args:
        video (`str`): name of the video; may contain "/".
        expression_id (`str`): unique within its video.
        text (`str`): the sentence.
        type_id (`int`): 0 referring, 1 reasoning, 2 no such object.
        anno_ids (`tuple[str, ...]`): the objects it means.
        frames (`tuple[str, ...]`): the frames, relative to the root of the set.
        height, width (`int`): size of the frames, in pixels.
        is_sentence (`bool`, *optional*): ReasonSeg: whether the query is a whole sentence, which takes the long form
            of the prompt.
        annotator (`int`, *optional*): Ref-DAVIS17: who wrote it, from 0.
        annotated (`tuple[int, ...]`, *optional*): frames whose true mask is known, if not all: only they are scored.
    """

    video: str
    expression_id: str
    text: str
    type_id: int
    anno_ids: tuple[str, ...]
    frames: tuple[str, ...]
    height: int
    width: int
    is_sentence: bool | None = None
    annotator: int | None = None
    annotated: tuple[int, ...] | None = None

    @property
    def scored_frames(self) -> tuple[int, ...]:
        """Numbers of the frames that are scored."""
        return tuple(range(len(self.frames))) if self.annotated is None else self.annotated

    @property
    def frame_names(self) -> tuple[str, ...]:
        """Names of the frames' files in predictions, without suffix: those of the images, else numbers."""
        names = tuple(PurePosixPath(frame).stem for frame in self.frames)
        if any("#" in frame for frame in self.frames) or len(set(names)) < len(names):
            return tuple(f"{number:05d}" for number in range(len(self.frames)))
        return names

    @property
    def place(self) -> str:
        """How messages name it."""
        return f"video `{self.video}`, expression `{self.expression_id}`"


class EvaluationSet:
    """The expressions of one split and what is true about them. Can be pickled for other processes.

    Args:
        benchmark ([`Benchmark`]): how it is evaluated.
        split (`str`): name of the split.
        root (path): folder that frames are relative to.
        expressions: rows with the columns of `EXPRESSION_FEATURES`: a list of dicts, or a `datasets.Dataset`.
        masks: rows of `MASK_FEATURES`, or `None` where there are none (server splits).
        videos: rows of `VIDEO_FEATURES`, for the foregrounds, or `None`.
        limit (`int`, *optional*): keep the first so many videos.

    Raises:
        ValueError: if there is no expression, one is there twice, the frames of a video are not the same in all of
            its expressions, or a mask that is named is missing.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        split: str,
        root: str | Path,
        expressions: Any,
        masks: Any | None = None,
        videos: Any | None = None,
        *,
        limit: int | None = None,
    ) -> None:
        self.benchmark, self.split, self.root = benchmark, split, Path(root)
        self.videos = _grouped(expressions, benchmark, limit)
        self._masks, self._foregrounds = masks, videos
        self._mask_rows = {} if masks is None else _positions(masks, "anno_id")
        self._video_rows = {} if videos is None else _positions(videos, "video_id")
        if not self.videos:
            raise ValueError(f"The split `{split}` of `{benchmark.name}` in `{root}` has no expression to evaluate.")
        if masks is not None:
            for expression in self.expressions:
                unknown = [anno_id for anno_id in expression.anno_ids if anno_id not in self._mask_rows]
                if unknown:
                    raise ValueError(
                        f"The mask `{unknown[0]}` of {expression.place} is not among the masks of the split "
                        f"`{split}`. Check the annotations with `visa data check`."
                    )

    @property
    def expressions(self) -> list[Expression]:
        """All expressions, video by video."""
        return [expression for group in self.videos.values() for expression in group]

    def subset(self, expressions: Sequence[Expression]) -> "EvaluationSet":
        """Return the same set with these expressions alone, as they are given."""
        smaller = copy.copy(self)
        smaller.videos = {}
        for expression in expressions:
            smaller.videos.setdefault(expression.video, []).append(expression)
        return smaller

    @property
    def has_masks(self) -> bool:
        """Whether predictions can be scored here."""
        return self._masks is not None

    def objects_of(self, expression: Expression) -> list[FrameMasks]:
        """Return the true masks of each object that the expression means, one entry per frame."""
        assert self._masks is not None
        clips = []
        for anno_id in expression.anno_ids:
            rles = _as_frames(self._masks[self._mask_rows[anno_id]]["rle"])
            if len(rles) != len(expression.frames):
                raise ValueError(
                    f"The mask `{anno_id}` of {expression.place} has {len(rles)} entries, but the video has "
                    f"{len(expression.frames)} frames. One entry per frame is needed."
                )
            clips.append(rles)
        return clips

    def ignored_of(self, expression: Expression) -> FrameMasks | None:
        """Return the region that counts neither way (ReasonSeg), one entry per frame, or `None`."""
        row = self._mask_rows.get(ignored_id(expression.video))
        return None if row is None or self._masks is None else _as_frames(self._masks[row]["rle"])

    def foreground_of(self, video: str) -> FrameMasks | None:
        """Return all objects of the video together, one entry per frame; `None` where that is not published."""
        row = self._video_rows.get(video)
        if row is None or self._foregrounds is None:
            return None
        return _as_frames(self._foregrounds[row]["foreground_rle"]) or None

    def fingerprint(self) -> str:
        """Return what identifies the questions: a hash of all expressions and frames, wherever they lie."""
        digest = hashlib.sha256()
        for expression in self.expressions:
            asked = (expression.video, expression.expression_id, expression.text, expression.frames)
            digest.update(json.dumps([*asked, expression.height, expression.width]).encode())
        return digest.hexdigest()[:16]


def ignored_id(video: str) -> str:
    """Return the `anno_id` under which a builder keeps the region of an image that counts neither way."""
    return f"{video}/ignore"


_FULL = {"expressions": "expressions", "masks": "masks", "videos": "videos"}
_REFER_SPLITS = ("val", "test", "testA", "testB")


def _refer(name: str) -> Benchmark:
    configs = {kind: f"{name}_{kind}" for kind in ("expressions", "masks")}
    return Benchmark(name, "ReferSeg", _REFER_SPLITS, summary="images", configs=configs)


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("revos", "ReVOS", ("valid", "train"), summary="types", configs=_FULL),
        # "directly packages 140 val video folders": https://github.com/henghuiding/MeViS, README, "CodaLab Evaluation
        # Submission Guideline". Ref-YouTube-VOS: https://github.com/wjn922/ReferFormer, docs/Ref-Youtube-VOS.md.
        Benchmark("mevis", "MeViS", ("valid_u", "valid", "train"), server_splits=("valid",)),
        Benchmark("ref_youtube_vos", "RefYoutubeVOS", ("valid", "train"), ("valid",), zip_folder="Annotations"),
        Benchmark("ref_davis17", "RefDAVIS17", ("valid", "train"), summary="annotators"),
        Benchmark("reason_seg", "ReasonSeg", ("val", "test", "train"), summary="images", first_only=True),
        _refer("refcoco"),
        _refer("refcoco+"),
        _refer("refcocog"),
        Benchmark("own_data", "OwnData"),
        Benchmark("synthetic", "Synthetic", ("valid", "unseen", "train"), summary="types", configs=_FULL),
    )
}
"""The data sets that `visa evaluate` knows, by name."""


def open_benchmark(
    name: str,
    data_dir: str | Path,
    split: str,
    *,
    cache_dir: str | Path | None = None,
    limit: int | None = None,
) -> EvaluationSet:
    """Prepare a data set from the folder that its authors publish, and open one split of it.

    Args:
        name (`str`): one of `BENCHMARKS`.
        data_dir (path): folder of the set.
        split (`str`): one of its splits.
        cache_dir (path, *optional*): where prepared rows are kept; that of `datasets` by default.
        limit (`int`, *optional*): keep the first so many videos.

    Returns:
        [`EvaluationSet`].

    Raises:
        ValueError: for a name or split that there is not, or annotations that are wrong.
        FileNotFoundError: if the folder does not hold the set.
        ImportError: if `datasets` is not installed.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"`dataset` is {name!r} but must be one of {', '.join(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    if benchmark.splits and split not in benchmark.splits:
        raise ValueError(f"`split` is {split!r} but `{name}` has {', '.join(benchmark.splits)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit} but at least 1 video must be evaluated.")
    builder_class = _builder(benchmark.builder)
    rows = {}
    for kind, config in benchmark.configs.items():
        if kind != "expressions" and split in benchmark.server_splits:
            continue
        builder = builder_class(
            config_name=config,
            data_dir=str(Path(data_dir).absolute()),
            cache_dir=None if cache_dir is None else str(cache_dir),
        )
        _prepare(builder)
        if split not in builder.info.splits:
            found = ", ".join(builder.info.splits) or "none"
            raise ValueError(f"There is no split {split!r} of `{name}` in `{data_dir}`. It has: {found}.")
        rows[kind] = builder.as_dataset(split=split)
    return EvaluationSet(
        benchmark, split, data_dir, rows["expressions"], rows.get("masks"), rows.get("videos"), limit=limit
    )


def _builder(name: str) -> Any:
    try:
        return getattr(import_module("visa_hf.datasets_scripts"), name)
    except ImportError as error:
        if error.name != "datasets":
            raise
        raise ImportError("Evaluation needs `datasets`: `pip install visa-hf[eval]`.") from error


def _prepare(builder: Any) -> None:
    """Prepare the rows; an error says what is wrong with the annotations, not that `datasets` met one."""
    from datasets.exceptions import DatasetGenerationError

    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise


def _grouped(rows: Any, benchmark: Benchmark, limit: int | None) -> dict[str, list[Expression]]:
    """Return the expressions of each video, both in the order of the rows."""
    videos: dict[str, list[Expression]] = {}
    seen: set[tuple[str, str]] = set()
    for row in rows:
        video, expression_id = str(row["video_id"]), str(row["expression_id"])
        if video not in videos and len(videos) == limit:
            continue
        _check_name("a video", video, is_path=True)
        _check_name("an expression", expression_id, is_path=False)
        group = videos.setdefault(video, [])
        if benchmark.first_only and group:
            continue
        expression = Expression(
            video=video,
            expression_id=expression_id,
            text=row["expression"],
            type_id=int(row["type_id"]),
            anno_ids=tuple(row["anno_ids"]),
            frames=tuple(row["frames"]),
            height=int(row["height"]),
            width=int(row["width"]),
            is_sentence=row.get("is_sentence"),
            annotated=None if row.get("annotated") is None else tuple(row["annotated"]),
            annotator=_annotator(video, expression_id) if benchmark.summary == "annotators" else None,
        )
        if (video, expression_id) in seen:
            raise ValueError(f"There are two rows for {expression.place}. An expression may be there once.")
        if group and (group[0].frames, group[0].height, group[0].width) != (
            expression.frames,
            expression.height,
            expression.width,
        ):
            raise ValueError(f"The frames of {expression.place} differ from those of the video's other expressions.")
        if not expression.frames:
            raise ValueError(f"The {expression.place} has no frames.")
        seen.add((video, expression_id))
        group.append(expression)
    for video in videos:
        inside = [str(parent) for parent in PurePosixPath(video).parents if str(parent) in videos]
        if inside:
            raise ValueError(
                f"The videos `{inside[0]}` and `{video}` cannot both be evaluated: one's folder is in the other's."
            )
    return videos


def _check_name(kind: str, name: str, *, is_path: bool) -> None:
    """Refuse names that would lead out of the folder of predictions."""
    parts = name.split("/") if is_path else [name]
    if any(part in ("", ".", "..") or set(part) & set("/\\\0") for part in parts):
        raise ValueError(f"{name!r} cannot be the name of {kind}: predictions are kept in folders of these names.")


def _annotator(video: str, expression_id: str) -> int:
    """Return who wrote an expression: they are numbered object by object, the annotators in their order."""
    if not expression_id.isdecimal():
        raise ValueError(
            f"The expression `{expression_id}` of video `{video}` has no number, which would tell its annotator."
        )
    return int(expression_id) % NUM_ANNOTATORS


def _positions(rows: Any, column: str) -> dict[str, int]:
    """Return where in `rows` each value of a column stands, reading that column alone."""
    values = [row[column] for row in rows] if isinstance(rows, list) else rows[column]
    return {str(value): position for position, value in enumerate(values)}


def _as_frames(rles: Sequence[Mapping[str, Any] | None]) -> FrameMasks:
    return [None if rle is None else {"size": list(rle["size"]), "counts": rle["counts"]} for rle in rles]
