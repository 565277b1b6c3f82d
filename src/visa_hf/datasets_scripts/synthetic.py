"""A world of our own to learn in: short clips of moving shapes, and sentences whose meaning is proven.

`make_clip` makes one clip, `write_dataset` a data set in ReVOS's on-disk format (see `revos.py`). A clip depends on
its seed, split, index and options alone: the pixels are the same on every machine and for any number of processes, and
so are the JPEG files with one version of Pillow. What a scene is made of is in `synthetic_scene.py`.
"""

import io
import json
import logging
import math
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from visa_hf.rle import encode_mask, mask_area

from .synthetic_dice import Dice
from .synthetic_drawing import outline_shapes, paint_frames
from .synthetic_expressions import IDEAS, NO_OBJECT, SyntheticExpression, make_expressions
from .synthetic_facts import Facts
from .synthetic_measures import Measures
from .synthetic_scene import LEVELS, Look, Scene, plan_scene

logger = logging.getLogger(__name__)

# Changes whenever the same seed gives another clip.
VERSION = 2
# Changes whenever the answers to its sentences do.
ANSWERS_VERSION = 2
# "unseen" holds the compositions of colour, form and texture that the others never hold; it is read with "valid".
SPLITS = ("train", "valid", "unseen")
DESCRIPTION_FILE = "synthetic.json"

_MIN_SIDE, _MAX_SIDE = 32, 4096
_MAX_OBJECTS = 12
_MAX_TRIES = 100
_MIN_EXPRESSIONS = 3
# A set that was written before sentences had weights is the same as one without them.
_WITHOUT_WEIGHTS = {"idea_weights": None, "look_weight": 1.0}
# In each video, anno_ids are consecutive from a multiple of this on.
_ANNO_IDS_PER_VIDEO = 16
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class SyntheticClip:
    """A clip with all that is known about it.

    Attributes:
        name (`str`): split and index, such as "train_00012".
        frames (`np.ndarray` of shape `(T, H, W, 3)`, uint8): RGB.
        masks (`np.ndarray` of shape `(N, T, H, W)`, bool): visible pixels of each object; they do not overlap.
        objects (`tuple[Look, ...]`): names of colour, form and texture of each object; a later one lies in front.
        expressions (`tuple[SyntheticExpression, ...]`): sentences, with the objects they mean.
        scene (`Scene`): what was painted.
    """

    name: str
    frames: np.ndarray
    masks: np.ndarray
    objects: tuple[Look, ...]
    expressions: tuple[SyntheticExpression, ...]
    scene: Scene


@dataclass(frozen=True)
class ClipOptions:
    """What clips of a data set have in common.

    Attributes:
        size (`tuple[int, int]`): (H, W) of the frames, in pixels.
        num_frames (`tuple[int, int]`): least and most frames of a clip. Fewer than 6 show shapes at rest.
        levels (`tuple[int, ...]`): a clip is of one of these. 1: two to four shapes in six colours and forms, plain or
            striped, at rest or moving straight; 2: more of all, they also enter, leave, grow, spin and pass each
            other; 3: all colours and forms, overtaking, pillars, circling, backgrounds with a pattern, changing light.
        num_objects (`tuple[int, int]`, *optional*): least and most shapes; by default as the level has it.
        num_expressions (`int`): most sentences of a clip.
        antialias (`bool`): smooth edges in the pictures. Masks are the same.
        idea_weights (`Mapping[str, float]`, *optional*): how often an idea of a sentence is drawn against the others,
            for those that it names: {"place": 3.0}. Of those with 0, there is none.
        look_weight (`float`): how often a sentence that names one property of looks more is drawn against the others
            of its idea, in (0, 1]: with 0.2, "the leftmost shape" five times for once "the leftmost red shape".
    """

    size: tuple[int, int] = (128, 128)
    num_frames: tuple[int, int] = (16, 24)
    levels: tuple[int, ...] = LEVELS
    num_objects: tuple[int, int] | None = None
    num_expressions: int = 10
    antialias: bool = True
    idea_weights: Mapping[str, float] | None = None
    look_weight: float = 1.0

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(_MIN_SIDE <= side <= _MAX_SIDE for side in self.size):
            raise ValueError(f"`size` is {self.size}; (H, W) is needed, each from {_MIN_SIDE} to {_MAX_SIDE} pixels.")
        if len(self.num_frames) != 2 or not 1 <= self.num_frames[0] <= self.num_frames[1]:
            raise ValueError(f"`num_frames` is {self.num_frames}; (least, most) is needed, at least 1 frame.")
        if not self.levels or not set(self.levels) <= set(LEVELS):
            raise ValueError(f"`levels` is {self.levels}; one or more of {LEVELS} are needed.")
        if self.num_objects is not None and (
            len(self.num_objects) != 2 or not 2 <= self.num_objects[0] <= self.num_objects[1] <= _MAX_OBJECTS
        ):
            raise ValueError(
                f"`num_objects` is {self.num_objects}; (least, most) is needed, from 2 to {_MAX_OBJECTS}: "
                "with one shape alone there is nothing to tell apart."
            )
        if self.num_expressions < 1:
            raise ValueError(f"`num_expressions` is {self.num_expressions}; at least 1 is needed.")
        self._check_idea_weights(self.idea_weights or {})
        if not 0 < self.look_weight <= 1:
            raise ValueError(f"`look_weight` is {self.look_weight}; it must be above 0 and at most 1.")

    def _check_idea_weights(self, weights: Mapping[str, float]) -> None:
        unknown = [idea for idea in weights if idea not in IDEAS]
        if unknown:
            raise ValueError(f"`idea_weights` has {', '.join(unknown)}; ideas are {', '.join(IDEAS)}.")
        for idea, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"`idea_weights` has {weight} for {idea}; a number from 0 on is needed.")


def make_clip(seed: int, index: int, *, split: str = "train", options: ClipOptions | None = None) -> SyntheticClip:
    """Make one clip. It depends on these arguments alone.

    Args:
        seed (`int`): of the data set.
        index (`int`): of the clip in its split, from 0 on.
        split (`str`): "train", "valid" or "unseen"; they share no scene. All shapes of "unseen" have compositions of
            colour, form and texture that the others never have.
        options (`ClipOptions`, *optional*): what the clip is like.

    Raises:
        ValueError: an argument is out of range, or so many shapes find no room.
    """
    options = options or ClipOptions()
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}; it must be one of {SPLITS}.")
    if seed < 0 or index < 0:
        raise ValueError(f"`seed` is {seed} and `index` {index}; both must be at least 0.")
    dice = Dice("visa-synthetic", VERSION, seed, split, index)
    num_frames = options.num_frames[0] + dice.below(options.num_frames[1] - options.num_frames[0] + 1)
    level = dice.choice(options.levels)
    for _ in range(_MAX_TRIES):
        scene = plan_scene(
            dice,
            size=options.size,
            num_frames=num_frames,
            level=level,
            num_objects=options.num_objects,
            is_unseen=split == "unseen",
        )
        labels, silhouettes = outline_shapes(scene)
        measures = Measures(scene, labels, silhouettes)
        if not measures.is_well_visible():
            continue
        objects = tuple(shape.look for shape in scene.shapes)
        facts = Facts(list(objects), measures)
        expressions = make_expressions(facts, dice, options.num_expressions, options.idea_weights, options.look_weight)
        num_about_something = sum(expression.type_id != NO_OBJECT for expression in expressions)
        if num_about_something >= min(_MIN_EXPRESSIONS, options.num_expressions):
            frames = paint_frames(scene, silhouettes, antialias=options.antialias)
            masks = labels == np.arange(1, len(objects) + 1, dtype=np.uint8)[:, None, None, None]
            return SyntheticClip(f"{split}_{index:05d}", frames, masks, objects, expressions, scene)
    lacking = "shows each of them" if not options.idea_weights else "shows each of them and has sentences enough"
    advice = "" if not options.idea_weights else f", or other `idea_weights` than {dict(options.idea_weights)}"
    raise ValueError(
        f"No scene of level {level} with {options.num_objects} shapes of `size` {options.size} {lacking} "
        f"after {_MAX_TRIES} tries. Give fewer `num_objects` or a larger `size`{advice}."
    )


def write_dataset(
    output: str | os.PathLike[str],
    *,
    num_videos: Mapping[str, int],
    seed: int = 0,
    options: ClipOptions | None = None,
    num_proc: int = 1,
    show_progress: bool = True,
) -> None:
    """Write a data set in ReVOS's on-disk format.

    `OUTPUT.partial` is filled first and renamed at the end. Called again after an interruption with the same
    arguments, it goes on where it stopped; `num_proc` changes nothing in the files.

    Videos are named `train_00000`, `valid_00000` and `unseen_00000`; the unseen ones are in
    `meta_expressions_valid_.json` too. Expressions have three keys more than ReVOS's: `idea` (what kind of thought it
    takes), `meaning` (the program, see `Facts.truth`) and `answer` (what is asked for in plain words, a description,
    then `[SEG]`): see `Synthetic`. `synthetic.json` holds versions, seed, options and the names of the unseen videos.

    Args:
        output (path): folder to write; it must not be there, unless it holds this very data set.
        num_videos (`Mapping[str, int]`): how many videos of "train", "valid" and "unseen".
        seed (`int`): of the data set.
        options (`ClipOptions`, *optional*): what the clips are like.
        num_proc (`int`): processes.
        show_progress (`bool`): whether to show a progress bar.

    Raises:
        FileExistsError: `output` is something else, or `OUTPUT.partial` was begun with other arguments.
        ValueError: an argument is out of range.
    """
    options = options or ClipOptions()
    videos = _listed_videos(num_videos)
    if num_proc < 1:
        raise ValueError(f"`num_proc` is {num_proc}; at least 1 process is needed.")
    if seed < 0:
        raise ValueError(f"`seed` is {seed}; it must be at least 0.")
    description = _description(seed, num_videos, options)
    output = Path(output)
    partial = output.with_name(output.name + ".partial")
    if os.path.lexists(output):
        _check_same(output, description, "Give another `output`, or remove it.")
        logger.info("`%s` is complete already.", output)
        return
    if partial.exists():
        _check_same(partial, description, "Give the arguments it was begun with, or remove it.")
    parts = partial / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    _write_whole(partial / DESCRIPTION_FILE, json.dumps(description, indent=1).encode())
    todo = [(split, index) for split, index in videos if not (parts / f"{split}_{index:05d}.json").exists()]
    with tqdm(total=len(videos), initial=len(videos) - len(todo), desc=output.name, disable=not show_progress) as bar:
        for _ in _written_clips(partial, seed, options, todo, videos, num_proc):
            bar.update()
    _join_parts(partial, videos)
    shutil.rmtree(parts)
    os.rename(partial, output)


def _listed_videos(num_videos: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return (split, index) of all videos, in the order in which they are written."""
    if not num_videos or not set(num_videos) <= set(SPLITS):
        raise ValueError(f"`num_videos` has the splits {sorted(num_videos)}; it may have {', '.join(SPLITS)}.")
    if min(num_videos.values()) < 0 or sum(num_videos.values()) == 0:
        raise ValueError(f"`num_videos` is {dict(num_videos)}; no number may be negative, and one must be positive.")
    return [(split, index) for split in SPLITS for index in range(num_videos.get(split, 0))]


def _description(seed: int, num_videos: Mapping[str, int], options: ClipOptions) -> dict[str, Any]:
    description = {
        "generator": "visa_hf.datasets_scripts.synthetic",
        "version": VERSION,
        "answers_version": ANSWERS_VERSION,
        "seed": seed,
        "num_videos": {split: num_videos.get(split, 0) for split in SPLITS},
        "options": {name: value for name, value in asdict(options).items() if value != _WITHOUT_WEIGHTS.get(name, ())},
        "unseen_videos": [f"unseen_{index:05d}" for index in range(num_videos.get("unseen", 0))],
    }
    return json.loads(json.dumps(description))  # tuples become lists, as in the file it is compared with


def _check_same(folder: Path, description: dict[str, Any], advice: str) -> None:
    """Raise an error unless a folder is, or was begun as, the data set that is described."""
    path = folder / DESCRIPTION_FILE
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise FileExistsError(f"`{folder}` exists, and is no synthetic data set. {advice}") from None
    if found != description:
        raise FileExistsError(f"`{folder}` holds another synthetic data set: see `{path}`. {advice}")


def _written_clips(
    partial: Path,
    seed: int,
    options: ClipOptions,
    todo: list[tuple[str, int]],
    videos: list[tuple[str, int]],
    num_proc: int,
) -> Iterator[None]:
    """Write clips, one step each."""
    places = {video: place for place, video in enumerate(videos)}
    jobs = [(partial, seed, split, index, options, places[split, index]) for split, index in todo]
    if num_proc == 1 or len(jobs) < 2:
        for job in jobs:
            _write_clip(*job)
            yield
        return
    # A process that torch was used in must not be forked.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_proc, len(jobs)), mp_context=context)
    try:
        for future in as_completed([pool.submit(_write_clip, *job) for job in jobs]):
            future.result()
            yield
    finally:
        pool.shutdown(cancel_futures=True)


def _write_clip(partial: Path, seed: int, split: str, index: int, options: ClipOptions, place: int) -> None:
    """Write the frames of a clip, and at last its annotations: where they are, it is complete."""
    clip = make_clip(seed, index, split=split, options=options)
    folder = partial / "JPEGImages" / clip.name
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(clip.frames):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        (folder / f"{number:05d}.jpg").write_bytes(buffer.getvalue())
    part = json.dumps(_annotations(clip, place), separators=(",", ":"))
    _write_whole(partial / "parts" / f"{clip.name}.json", part.encode())


def _annotations(clip: SyntheticClip, place: int) -> dict[str, Any]:
    """Return what ReVOS's files say about a video, the place of which in the data set is given."""
    height, width = clip.scene.size
    first_id = place * _ANNO_IDS_PER_VIDEO
    foreground = [encode_mask(mask) for mask in np.any(clip.masks, axis=0)]
    expressions = {
        str(number): {
            "exp": expression.text,
            "obj_id": list(expression.objects),
            "anno_id": [first_id + thing for thing in expression.objects],
            "type_id": expression.type_id,
            "idea": expression.idea,
            "meaning": expression.meaning,
            "answer": expression.answer,
        }
        for number, expression in enumerate(clip.expressions)
    }
    meta = {
        "vid_id": place,
        "height": height,
        "width": width,
        "frames": [f"{number:05d}" for number in range(len(clip.frames))],
        "expressions": expressions,
    }
    masks = {
        str(first_id + thing): [encode_mask(mask) if mask.any() else None for mask in masks]
        for thing, masks in enumerate(list(clip.masks))
    }
    ratios = [mask_area(rle) / (height * width) for rle in foreground]
    return {"meta": meta, "masks": masks, "foreground": {"masks_rle": foreground, "foreground_ratio": ratios}}


def _join_parts(partial: Path, videos: list[tuple[str, int]]) -> None:
    """Write the four annotation files, one video after the other."""

    def read(split: str, index: int) -> tuple[str, dict[str, Any]]:
        name = f"{split}_{index:05d}"
        return name, json.loads((partial / "parts" / f"{name}.json").read_bytes())

    for split in ("train", "valid"):
        chosen = [video for video in videos if (video[0] == "train") == (split == "train")]
        if not chosen:
            continue
        metas = ((name, part["meta"]) for name, part in (read(*video) for video in chosen))
        write_json_pairs(partial / f"meta_expressions_{split}_.json", metas, start='{"videos":{', end="}}")
    masks = (pair for video in videos for pair in read(*video)[1]["masks"].items())
    write_json_pairs(partial / "mask_dict.json", masks)
    foregrounds = ((name, part["foreground"]) for name, part in (read(*video) for video in videos))
    write_json_pairs(partial / "mask_dict_foreground.json", foregrounds)


def write_json_pairs(path: Path, pairs: Iterable[tuple[str, Any]], *, start: str = "{", end: str = "}") -> None:
    """Write a JSON object too large for memory, one pair at a time."""
    separator = ""
    with open(path, "w", encoding="utf-8") as file:
        file.write(start)
        for key, value in pairs:
            file.write(f"{separator}{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}")
            separator = ",\n"
        file.write(end)


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
