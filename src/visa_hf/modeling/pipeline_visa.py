"""`pipeline("reasoning-video-segmentation")` of transformers: videos and sentences in, dictionaries with masks out.

The package registers it on import; a saved folder names it in its config.json and carries this file, so that it also
works where the package is missing, with `trust_remote_code=True`. The work is that of a session
(video_session_visa.py); nothing is drawn or written here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import GeneratorType
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Pipeline

from .outputs_visa import PackedFrame, VideoSegmentation
from .video_session_visa import DEFAULT_MAX_FRAMES, VisaVideoSession, make_results

TASK = "reasoning-video-segmentation"
# What a saved config.json says about the pipeline, in the words of transformers.
CUSTOM_PIPELINES = {TASK: {"impl": "pipeline_visa.VisaPipeline", "pt": ["AutoModel"], "type": "multimodal"}}

_SESSION_OPTIONS = (
    "threshold",
    "start",
    "end",
    "every",
    "max_frames",
    "fps",
    "allow_truncated",
    "max_queries_per_batch",
)
_QUERY_OPTIONS = ("target_frame", "reference_frames", "num_reference_frames", "sampler", "explain")
_OPTIONS = (*_SESSION_OPTIONS, *_QUERY_OPTIONS, "max_new_tokens")


@dataclass(frozen=True)
class _Request:
    """One video and its queries. No dictionary: transformers would move tensors of those to the model's device."""

    video: Any
    queries: tuple[str | dict[str, Any], ...]
    is_single: bool


class LazyMasks:
    """Masks of T frames that are kept packed, and read like an array of bools.

    `masks[5]`, `masks[2:4]` and iteration unpack the frames that they touch; `np.asarray(masks)`, functions of numpy
    and any other index unpack all of them: one byte a pixel.

    Args:
        unpack (`Callable[[int], np.ndarray]`): returns the masks of a frame, 0 to T - 1.
        shape (`tuple[int, ...]`): T, and the shape of what `unpack` returns.
    """

    dtype = np.dtype(bool)

    def __init__(self, unpack: Callable[[int], np.ndarray], shape: tuple[int, ...]) -> None:
        self._unpack = unpack
        self.shape = shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            frames = [self._unpack(position) for position in range(len(self))[index]]
            return np.stack(frames) if frames else np.zeros((0, *self.shape[1:]), dtype=bool)
        if isinstance(index, int | np.integer):
            return self._unpack(range(len(self))[index])
        return self[:][index]

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self._unpack, range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("The masks are packed: as an array they are a copy. Leave `copy=False` out.")
        return self[:].astype(dtype or self.dtype, copy=False)

    def __repr__(self) -> str:
        return f"LazyMasks(shape={self.shape}, dtype=bool)"


# Its annotations fit none of the pipelines of transformers.
_Base: Any = Pipeline


class VisaPipeline(_Base):
    """Finds what sentences mean in videos.

    ```python
    pipe = pipeline("reasoning-video-segmentation", model="folder or Hub id")
    pipe("clip.mp4", "which dog wins?")  # a dictionary
    pipe("clip.mp4", ["the cat", "the dog that it fears"])  # a list of two
    pipe([{"video": "a.mp4", "query": "the cat"}, {"video": "b.mp4", "query": ["the dog", "the ball"]}])
    for result in pipe({"video": path, "query": "the cat"} for path in paths):  # one after the other, as they come
        ...
    ```

    Besides what every pipeline takes (`device`, `dtype`, `device_map`, `num_workers`), when it is made or when it is
    called:

    - `threshold` (`float`, 0.5): probability above which a pixel of the target frame is in the mask.
    - `target_frame` (`int`), `reference_frames` (list of `int`), `num_reference_frames` (`int`), `sampler` (callable
      or `"visa"`): the frames that the model looks at, as of `add_query`.
    - `explain` (`bool`, `False`): ask for a reason, too; it is in the result's `answer`.
    - `max_new_tokens` (`int`, 64): length limit of an answer.
    - `start`, `end` (seconds, or frames like `"120f"`), `every` (`int`, 1): the frames that are segmented.
    - `max_frames` (`int` or `None`, 10000): refuse to segment more frames than this.
    - `fps` (`float`): frames per second of frames that have no rate of their own.
    - `allow_truncated` (`bool`, `False`): use the frames before the damage of a damaged video.
    - `batch_size` (`int`, 8): queries about one video that are computed together, `max_queries_per_batch` of its
      session. Videos are gone through one by one: their frames are what fills a device. Masks do not depend on it.

    Args:
        args, kwargs: as of `Pipeline`; `model` and `processor` are needed, which `pipeline` loads by name.

    Raises:
        TypeError: for a model that is not of VISA, or an unknown argument.
        ValueError: if model and processor do not fit together.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # `pipeline` hands on what it has used itself.
        kwargs.pop("local_files_only", None)
        super().__init__(*args, **kwargs)
        if self.model.config.model_type != "visa":
            raise TypeError(
                f"`model` is a {type(self.model).__name__}, which is no VISA model. Give a folder, a Hub id, or a "
                "`VisaForVideoSegmentation`."
            )
        if self.processor is None:
            raise ValueError("`processor` is missing. Give the one that was saved with the model.")
        check_processor(self.model, self.processor)
        self.model.eval()

    def __call__(self, video: Any, query: Any = None, **kwargs: Any) -> Any:
        """Segment one video, or several.

        Args:
            video: path of a video file, of a folder of frames or of an image; a uint8 array or tensor of shape
                `(T, H, W, 3)`; or a list of images. Without `query`, one or several dictionaries with `video` and
                `query`: a dictionary, a list of them, a generator, or a data set.
            query (`str`, `dict` or list of these, *optional*): what to segment. A dictionary has arguments of
                `add_query`, as `{"query": "the dog", "target_frame": 5}`, which count more than those of the call.
            kwargs: as described in [`VisaPipeline`].

        Returns:
            A dictionary for one query, a list of them for a list of queries; for a list of videos, a list of either;
            for a generator or a dataset, an iterator, which computes what it is asked for. T is the number of frames
            segmented, N of objects: one for each [SEG] of the answer, 0 if there is nothing to segment.

            - `query` (`str`), `answer` (`str`): the sentence, and what the model says.
            - `masks` ([`LazyMasks`] of shape `(T, H, W)`, bool): the pixels of all objects, in each frame.
            - `object_masks` ([`LazyMasks`] of shape `(T, N, H, W)`, bool): those of each object; they do not overlap.
            - `scores` (list of N `float`): SAM's estimate of each object's IoU on the target frame.
            - `frame_scores` (list of T lists of N `float`, in [0, 1]): how sure each mask is, the mean probability of
              its pixels; 0 if it is empty.
            - `frame_indices` (list of T `int`): the frames segmented, counted in the whole video.
            - `target_frame` (`int`), `reference_frames` (list of `int`): the frames that the model looked at.

        Raises:
            ValueError, TypeError, FileNotFoundError, ImportError, RuntimeError: if the input cannot be used; the
                message says what to do.
        """
        batch_size = kwargs.pop("batch_size", self._batch_size)
        if batch_size is not None:
            kwargs["max_queries_per_batch"] = batch_size
        inputs = _inputs_of(video) if query is None else {"video": video, "query": query}
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, batch_size=1, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save the model, with the code of all parts, and its processor.

        Args:
            save_directory (`str` or `os.PathLike`): a folder.
            kwargs: as of the model's `save_pretrained`, and of its processor's.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(str(save_directory), **kwargs)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Refuse unknown arguments; all known ones are for `_forward`."""
        for name in kwargs:
            if name not in _OPTIONS:
                nearest = get_close_matches(name, _OPTIONS, n=1, cutoff=0)
                raise TypeError(f"The pipeline has no argument `{name}`. Did you mean `{nearest[0]}`?")
        return {}, kwargs, {}

    def preprocess(self, inputs: Any) -> _Request:
        """Check the form of one input; its video is opened later."""
        if not isinstance(inputs, Mapping):
            raise TypeError(
                f"An input is a {type(inputs).__name__} but must be a dictionary with `video` and `query`. For one "
                "video, give its `query` as the second argument; for several, give a list of dictionaries."
            )
        for name in inputs:
            if name not in ("video", "query"):
                raise ValueError(
                    f"An input has the key {name!r}, but only `video` and `query` are known. Arguments of one query "
                    'go into a dictionary of its own: `"query": {"query": "the dog", "target_frame": 5}`.'
                )
        for name in ("video", "query"):
            if inputs.get(name) is None:
                raise ValueError(f"An input has no `{name}`. Give a dictionary with `video` and `query`.")
        query = inputs["query"]
        if isinstance(query, list | tuple):
            if not query:
                raise ValueError("`query` is an empty list. Give at least one sentence.")
            return _Request(inputs["video"], tuple(query), is_single=False)
        return _Request(inputs["video"], (query,), is_single=True)

    def _forward(
        self, request: _Request, max_new_tokens: int | None = None, **options: Any
    ) -> tuple[list[VideoSegmentation], bool]:
        """Ask about one video and track the answers."""
        opened: dict[str, Any] = {name: options[name] for name in _SESSION_OPTIONS if name in options}
        asked: dict[str, Any] = {name: options[name] for name in _QUERY_OPTIONS if name in options}
        if max_new_tokens is not None:
            asked["max_new_tokens"] = max_new_tokens
        opened.setdefault("max_frames", DEFAULT_MAX_FRAMES)
        with VisaVideoSession(request.video, self.processor, **opened) as session:
            self.model.add_queries(session, request.queries, **asked)
            frames = [PackedFrame.pack(output) for output in self.model.propagate_in_video_iterator(session)]
            return make_results(session, frames), request.is_single

    def postprocess(self, outputs: tuple[list[VideoSegmentation], bool]) -> Any:
        """Make dictionaries of the results of one video: one, or a list."""
        results, is_single = outputs
        dictionaries = [as_dictionary(result) for result in results]
        return dictionaries[0] if is_single else dictionaries


def _inputs_of(inputs: Any) -> Any:
    """Return inputs as transformers takes them: a list is gone through at once, a data set or generator lazily."""
    if isinstance(inputs, list | tuple):
        return list(inputs)
    if isinstance(inputs, str | Mapping | np.ndarray | Tensor | Dataset | GeneratorType):
        return inputs
    return (item for item in inputs) if isinstance(inputs, Iterable) else inputs


def as_dictionary(result: VideoSegmentation) -> dict[str, Any]:
    """Return what the pipeline returns for one query, which `VisaPipeline.__call__` describes."""
    size = result.height, result.width
    return {
        "query": result.query,
        "answer": result.answer,
        "masks": LazyMasks(result.mask_of, (len(result), *size)),
        "object_masks": LazyMasks(result.object_masks_of, (len(result), result.num_objects, *size)),
        "scores": list(result.scores),
        "frame_scores": [list(scores) for scores in result.frame_scores],
        "frame_indices": list(result.frame_indices),
        "target_frame": result.frame_selection.target_idx,
        "reference_frames": list(result.frame_selection.reference_idx),
    }


def check_processor(model: Any, processor: Any) -> None:
    """Refuse a processor of another model.

    Raises:
        ValueError: if [SEG] is another token in it.
    """
    if processor.seg_token_id != model.config.seg_token_id:
        raise ValueError(
            f"The model's [SEG] is token {model.config.seg_token_id} but its processor's is "
            f"{processor.seg_token_id}. Use the processor that was saved with the model."
        )
