"""The columns of the prepared data sets: one set of names for all builders.

Masks are run lengths as in `visa_hf.rle`; they live in rows of their own, one per annotated object, and an expression
names the objects that it means by `anno_ids`: its mask is their union. Nothing here reads a file.

A frame is a path relative to the folder given as `data_dir`: an image file, or `clip.mp4#17`, the decoded frame 17
(counted from 0) of a video file. A still image is a video of one frame.
"""

from datasets import Features, List, Value

TYPE_REFERRING = 0
TYPE_REASONING = 1
TYPE_NO_OBJECT = 2

RLE_FEATURE = {"size": List(Value("int32"), length=2), "counts": Value("string")}
"""One mask: `size` is [H, W] of the frame, `counts` COCO's compressed string of run lengths."""

EXPRESSION_FEATURES = Features(
    {
        "dataset": Value("string"),  # the builder's short name, such as "revos"
        "video_id": Value("string"),
        "expression_id": Value("string"),  # unique within its video
        "expression": Value("string"),  # the sentence, as published
        "type_id": Value("int32"),  # 0 referring, 1 reasoning, 2 no such object
        "anno_ids": List(Value("string")),  # the objects meant: rows of the masks; [] if none or if not published
        "frames": List(Value("string")),  # the whole video, in time order
        "height": Value("int32"),  # of the frames, in pixels
        "width": Value("int32"),
    }
)
"""One row per expression of a video."""

REASON_SEG_FEATURES = Features(
    {**EXPRESSION_FEATURES, "is_sentence": Value("bool"), "explanation": Value("string")}  # explanation: None if none
)
"""`EXPRESSION_FEATURES` and what only ReasonSeg knows: whether the query is a whole sentence, and the answer's why."""

MASK_FEATURES = Features(
    {
        "video_id": Value("string"),
        "anno_id": Value("string"),  # unique within a split
        "rle": List(RLE_FEATURE),  # one entry per frame of the video; None where the object is not to be seen
    }
)
"""One row per annotated object of a video."""

VIDEO_FEATURES = Features(
    {
        "video_id": Value("string"),
        "frames": List(Value("string")),
        "height": Value("int32"),
        "width": Value("int32"),
        "foreground_rle": List(
            RLE_FEATURE
        ),  # all annotated objects together, one entry per frame; [] if not published
        "foreground_ratio": List(Value("float32")),  # their share of each frame, in [0, 1]; [] if not published
    }
)
"""One row per video."""

CONVERSATION_FEATURES = Features(
    {
        "dataset": Value("string"),
        "video_id": Value("string"),
        "conversation_id": Value("string"),
        "frames": List(Value("string")),  # [] if the conversation is about no picture
        "turns": List({"question": Value("string"), "answer": Value("string")}),
    }
)
"""One row per conversation; conversations have no masks."""
