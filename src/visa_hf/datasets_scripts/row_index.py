"""Which rows belong together: the expressions of a video, and the masks of an expression.

A few integer arrays over prepared data sets, whose rows stay in their memory-mapped Arrow files. Built once, in C++
and numpy: about 4 bytes a row and 4 bytes a mask named, shared by the workers of a data loader after a fork and cheap
to send to those that are spawned. Nothing here decodes a mask or reads a picture.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from visa_hf.datasets_scripts.annotations import AnnotationError
from visa_hf.datasets_scripts.features import TYPE_NO_OBJECT


class RowGroups:
    """Row numbers in groups: group i has the rows `rows[starts[i] : starts[i + 1]]`.

    Args:
        rows (`np.ndarray` of shape `(L,)`, int32): row numbers, group by group.
        starts (`np.ndarray` of shape `(G + 1,)`, int32): where each group begins, and L.
    """

    def __init__(self, rows: np.ndarray, starts: np.ndarray) -> None:
        self.rows, self.starts = rows.astype(np.int32), starts.astype(np.int32)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, group: int) -> np.ndarray:
        return self.rows[self.starts[group] : self.starts[group + 1]]


def group_by_video(expressions: Dataset, min_frames: int) -> tuple[RowGroups, int]:
    """Group the rows of videos with at least `min_frames` frames, in the order in which the videos first appear.

    Returns:
        `tuple[RowGroups, int]`: one group per video, and how many videos were left out as too short.

    Raises:
        AnnotationError: a video has no frames.
    """
    videos = _column(expressions, "video_id").dictionary_encode().indices.to_numpy()
    num_frames = pc.list_value_length(_column(expressions, "frames")).to_numpy(zero_copy_only=False)
    if len(num_frames) and num_frames.min() < 1:
        row = expressions[int(num_frames.argmin())]
        raise AnnotationError.at("The row names no frames.", video=row["video_id"], expression=row["expression_id"])
    kept = np.flatnonzero(num_frames >= min_frames)
    ordered = kept[np.argsort(videos[kept], kind="stable")]
    codes, starts = np.unique(videos[ordered], return_index=True)
    num_videos = int(videos.max()) + 1 if len(videos) else 0
    return RowGroups(ordered, np.append(starts, len(ordered))), num_videos - len(codes)


def join_masks(expressions: Dataset, masks: Dataset | None) -> RowGroups:
    """Look up the masks that each expression names: group i has the rows of `masks` of expression row i.

    Args:
        expressions (`datasets.Dataset`): with the columns `anno_ids` and `type_id`.
        masks (`datasets.Dataset`, *optional*): with the column `anno_id`.

    Raises:
        AnnotationError: an id is there twice, or an expression names one that is not there.
        ValueError: expressions mean objects, but there are no masks at all.
    """
    anno_ids = _column(expressions, "anno_ids")
    num_named = pc.list_value_length(anno_ids).fill_null(0).to_numpy(zero_copy_only=False)
    named = anno_ids.flatten()
    starts = np.concatenate([[0], np.cumsum(num_named)])
    if masks is None or len(masks) == 0:
        means_object = pc.any(pc.not_equal(_column(expressions, "type_id"), TYPE_NO_OBJECT)).as_py()
        if means_object or len(named):
            raise ValueError(
                "The expressions mean objects, but there are no masks: the split is published without. Train on one "
                "that has them."
            )
        return RowGroups(np.zeros(0, np.int32), starts)
    known = _column(masks, "anno_id")
    if len(known.unique()) < len(known):
        counts = known.value_counts()
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise AnnotationError(f"`anno_id` {twice!r} is there twice among the masks. Ids must be unique in a split.")
    rows = pc.index_in(named, value_set=known)
    if rows.null_count:
        missing = int(np.flatnonzero(rows.is_null().to_numpy(zero_copy_only=False))[0])
        row = expressions[int(np.searchsorted(starts, missing, side="right")) - 1]
        raise AnnotationError.at(
            f"`anno_id` {named[missing].as_py()!r} has no mask. Name one of those in the masks.",
            video=row["video_id"],
            expression=row["expression_id"],
        )
    return RowGroups(rows.to_numpy(), starts)


def require_annotated_frames(expressions: Dataset) -> None:
    """Refuse expressions that say which of their frames are annotated, and name none.

    Raises:
        AnnotationError: the column `annotated` has an empty list.
    """
    if "annotated" not in expressions.column_names:
        return
    num_annotated = pc.list_value_length(_column(expressions, "annotated"))
    empty = np.flatnonzero(pc.equal(num_annotated, 0).fill_null(False).to_numpy(zero_copy_only=False))
    if len(empty):
        row = expressions[int(empty[0])]
        raise AnnotationError.at(
            "No frame is annotated, so there is nothing to learn. Annotate one, or leave the expression out.",
            video=row["video_id"],
            expression=row["expression_id"],
        )


def _column(dataset: Dataset, name: str) -> pa.Array:
    """Return one column as one Arrow array, in the order of the rows."""
    if name not in dataset.column_names:
        raise ValueError(
            f"The data set has no column `{name}`, but {', '.join(map(repr, dataset.column_names))}. Give one made by "
            "a builder of `visa_hf.datasets_scripts`."
        )
    column = dataset.select_columns([name]).with_format("arrow")[:][name]
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
