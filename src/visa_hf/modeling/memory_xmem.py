"""XMem's three memories: sensory, working and long-term (https://huggingface.co/papers/2207.07115, section 3).

State and bookkeeping of one video in one direction, no network: what is remembered, read, consolidated and dropped.
Letters: L memory elements (positions h * w of memory frames, or prototypes), P positions of the reading frame,
N objects, CK CV CS channels of keys, values and sensory memory. Elements are rows here, (L, C).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

# Similarities held at once while reading, 128 MiB in float32: large frames are read in slices of their positions.
_MAX_SIMILARITIES = 2**25
# Usage is summed in whole numbers of 2^-40, so that the sum does not depend on the order of adding (GPUs vary it).
_USAGE_UNIT = 2.0**-40
_NOTHING_YET = "Nothing has been memorised yet. Give a mask first: `step(memory, frame, masks)`."
# Age of an element that no frame has read yet: its usage is 0, not 0 / 0.
_NEW_AGE = 1e-7


def expand_memory_key(key: Tensor, shrinkage: Tensor) -> Tensor:
    """Return what makes `similarity` one matrix product, for the memory's side.

    -s_i * sum_c e_c (k_ic - q_c)^2 / sqrt(CK) = s_i / sqrt(CK) * (-sum_c k_ic^2 e_c + 2 sum_c k_ic e_c q_c
    - sum_c e_c q_c^2), which is linear in (k^2, k, 1) for each memory element.

    Args:
        key (`torch.Tensor` of shape `(L, CK)`): keys of the memory elements.
        shrinkage (`torch.Tensor` of shape `(L, 1)`): their shrinkage.

    Returns:
        `torch.Tensor` of shape `(L, 2 * CK + 1)`.
    """
    expanded = torch.cat([-key.square(), 2 * key, -torch.ones_like(shrinkage)], dim=-1)
    return expanded * (shrinkage / math.sqrt(key.shape[-1]))


def expand_frame_key(frame_key: Tensor, selection: Tensor) -> Tensor:
    """Return the reading frame's side of `similarity`: two tensors `(P, CK)` -> `(P, 2 * CK + 1)`."""
    weighted = selection * frame_key
    return torch.cat([selection, weighted, (weighted * frame_key).sum(dim=-1, keepdim=True)], dim=-1)


def similarity(key: Tensor, shrinkage: Tensor, frame_key: Tensor, selection: Tensor) -> Tensor:
    """Return the anisotropic L2 similarity (XMem equation 2) of each position with each memory element, at most 0.

    All tensors may have the same leading dimensions (a batch).

    Args:
        key (`torch.Tensor` of shape `(L, CK)`): keys of the memory elements.
        shrinkage (`torch.Tensor` of shape `(L, 1)`): their shrinkage.
        frame_key (`torch.Tensor` of shape `(P, CK)`): keys of the reading positions.
        selection (`torch.Tensor` of shape `(P, CK)`): weights of their channels.

    Returns:
        `torch.Tensor` of shape `(P, L)`.
    """
    return expand_frame_key(frame_key, selection) @ expand_memory_key(key, shrinkage).mT


def top_k_softmax(similarities: Tensor, top_k: int | None) -> tuple[Tensor, Tensor | None]:
    """Normalise the similarities of each position over its `top_k` best elements, or all where there are fewer.

    Args:
        similarities (`torch.Tensor` of shape `(P, L)`).
        top_k (`int` or `None`): `None` for all.

    Returns:
        Affinity of shape `(P, top_k)` and the elements it belongs to, of the same shape; or, for all elements,
        affinity of shape `(P, L)` and `None`.
    """
    if top_k is None or top_k >= similarities.shape[-1]:
        return similarities.softmax(dim=-1), None
    # Differs from XMem: softmax subtracts the maximum first, so that distant elements do not become 0 / 0.
    best = similarities.topk(top_k, dim=-1, sorted=False)
    return best.values.softmax(dim=-1), best.indices


def weighted_sum(affinity: Tensor, elements: Tensor | None, value: Tensor) -> Tensor:
    """Return affinity @ value, for `top_k_softmax`'s result and values `(L, C)`: `(P, C)`."""
    if elements is None:
        return affinity @ value
    return F.embedding_bag(elements, value, per_sample_weights=affinity, mode="sum")


@dataclass(frozen=True)
class FramePlan:
    """What a frame needs: prediction, memorising, and which update of the sensory memory."""

    is_predicted: bool
    is_memorised: bool
    is_deeply_updated: bool
    is_sensory_updated: bool


@dataclass
class _Elements:
    """Keys in memory, one row per element, and how much they were used: sum of affinity, and frames that read them."""

    key: Tensor  # (L, CK)
    shrinkage: Tensor  # (L, 1)
    selection: Tensor  # (L, CK)
    usage: Tensor  # (L,)
    age: Tensor  # (L,)

    @classmethod
    def new(cls, key: Tensor, shrinkage: Tensor, selection: Tensor) -> "_Elements":
        """Elements that no frame has read yet."""
        usage = torch.zeros_like(shrinkage[:, 0])
        return cls(key, shrinkage, selection, usage, usage + _NEW_AGE)

    @classmethod
    def cat(cls, parts: Sequence["_Elements"]) -> "_Elements":
        return cls(*(torch.cat([getattr(part, item.name) for part in parts]) for item in fields(cls)))

    def __getitem__(self, index: slice | Tensor) -> "_Elements":
        return _Elements(*(getattr(self, item.name)[index] for item in fields(self)))

    def __len__(self) -> int:
        return self.key.shape[0]

    @property
    def mean_usage(self) -> Tensor:
        return self.usage / self.age


@dataclass
class _Group:
    """Values of objects that entered on the same frame; later ones have values for part of the elements only.

    `value` (elements of this group, num_objects * CV) has long-term elements first. The group's long-term and working
    values belong to the last elements of the long-term and working keys.
    """

    num_objects: int
    value: Tensor
    num_long_term: int = 0

    @property
    def num_working(self) -> int:
        return self.value.shape[0] - self.num_long_term

    @property
    def working_value(self) -> Tensor:
        return self.value[self.num_long_term :]

    @property
    def long_term_value(self) -> Tensor:
        return self.value[: self.num_long_term]

    def replace(self, long_term_value: Tensor, working_value: Tensor) -> None:
        self.value = torch.cat([long_term_value, working_value])
        self.num_long_term = long_term_value.shape[0]


class XMemMemory:
    """What the tracker remembers of one video in one direction; made by `XMemModel.init_memory`.

    Args:
        memory_every (`int`): a frame is memorised every so many frames.
        deep_update_every (`int`): deep update of the sensory memory every so many frames; -1: with memory frames.
        top_k (`int` or `None`): elements that each position reads; `None` for all.
        use_long_term (`bool`): without it every memory frame stays in working memory, which then grows with the video.
        count_long_term_usage (`bool`): drop the least used long-term elements; otherwise the oldest.
        min_working_frames (`int`): frames that a consolidation leaves: the first, and the last but one fewer.
        max_working_frames (`int`): frames in working memory that cause a consolidation.
        num_prototypes (`int`): elements that a consolidation makes, at most.
        max_long_term_elements (`int`): bound of the long-term memory.

    Attributes:
        object_ids (`list[int]`): the objects so far, in the order in which they entered.
    """

    def __init__(
        self,
        *,
        memory_every: int,
        deep_update_every: int,
        top_k: int | None,
        use_long_term: bool,
        count_long_term_usage: bool,
        min_working_frames: int,
        max_working_frames: int,
        num_prototypes: int,
        max_long_term_elements: int,
    ) -> None:
        self.memory_every = memory_every
        self.deep_update_every = deep_update_every
        self.top_k = top_k
        self.use_long_term = use_long_term
        self.count_long_term_usage = count_long_term_usage
        self.min_working_frames = min_working_frames
        self.max_working_frames = max_working_frames
        self.num_prototypes = num_prototypes
        self.max_long_term_elements = max_long_term_elements

        self.object_ids: list[int] = []
        self._sensory: Tensor | None = None
        self._frame_size: tuple[int, int] | None = None
        self._is_finished = False
        self._frame_idx = -1
        self._last_memory_idx = 0
        self._last_deep_update_idx = -deep_update_every
        self._elements: _Elements | None = None  # long-term ones first
        self._num_long_term = 0
        self._expanded_key: Tensor | None = None  # (L, 2 * CK + 1): the elements' side of `similarity`
        self._groups: list[_Group] = []

    @property
    def num_working(self) -> int:
        """Elements in working memory."""
        return 0 if self._elements is None else len(self._elements) - self._num_long_term

    @property
    def num_long_term(self) -> int:
        """Elements in long-term memory."""
        return self._num_long_term

    @property
    def sensory(self) -> Tensor:
        """Sensory memory of the objects, of shape `(N, CS, h, w)`; a `RuntimeError` before the first mask."""
        if self._sensory is None:
            raise RuntimeError(_NOTHING_YET)
        return self._sensory

    @sensory.setter
    def sensory(self, sensory: Tensor) -> None:
        self._sensory = sensory

    def check_frame_size(self, height: int, width: int) -> None:
        """Refuse a frame after the last one, or of another size than the first; changes nothing.

        Raises:
            RuntimeError: after a frame stepped with `is_last=True`.
            ValueError: if the size differs from that of the earlier frames.
        """
        if self._is_finished:
            raise RuntimeError(
                "This memory has seen its last frame (`is_last=True`), which it did not memorise. "
                "Start a new one with `init_memory()`."
            )
        if self._frame_size not in (None, (height, width)):
            raise ValueError(
                f"`frame` has size {(height, width)} but the earlier frames of this memory have {self._frame_size}. "
                "Resize it, or start a new memory with `init_memory()`."
            )

    def resolve_ids(self, num_masks: int | None, object_ids: Sequence[int] | None) -> list[int]:
        """Return the ids that the masks of a frame belong to; changes nothing.

        Args:
            num_masks (`int` or `None`): masks given on the frame.
            object_ids (sequence of `int` or `None`): their ids; by default 1..K on the first masks, later all
                objects.

        Raises:
            ValueError: for ids without masks, another number of ids than of masks, an id given twice, or no ids where
                it is not clear which objects are meant.
            TypeError: for an id that is not an `int`.
        """
        if num_masks is None:
            if object_ids is not None and len(object_ids):
                raise ValueError(f"`object_ids` is {list(object_ids)} but no `masks` are given. Give a mask for each.")
            return []
        if object_ids is None:
            if self.object_ids and num_masks != len(self.object_ids):
                raise ValueError(
                    f"{num_masks} `masks` are given for {len(self.object_ids)} known objects ({self.object_ids}). "
                    "Say with `object_ids` whose masks they are."
                )
            return self.object_ids.copy() or list(range(1, num_masks + 1))
        ids = [_as_id(object_id) for object_id in object_ids]
        if len(ids) != num_masks:
            raise ValueError(f"{len(ids)} `object_ids` {ids} are given for {num_masks} `masks`. Give one id per mask.")
        if len(set(ids)) != len(ids):
            raise ValueError(f"`object_ids` {ids} names an object twice. Give each object once.")
        return ids

    def begin_frame(self, frame_size: tuple[int, int], given_ids: Sequence[int], is_last: bool) -> FramePlan:
        """Count the frame, take in new objects and say what the frame needs.

        Args:
            frame_size (`tuple[int, int]`): height and width, in pixels.
            given_ids (sequence of `int`): objects that a mask is given for.
            is_last (`bool`): nothing comes after this frame.
        """
        has_memory = bool(self.object_ids)
        self._frame_size = frame_size
        self._is_finished = is_last
        self._frame_idx += 1
        self.object_ids.extend(object_id for object_id in given_ids if object_id not in self.object_ids)

        is_due = self._frame_idx - self._last_memory_idx >= self.memory_every
        is_memorised = bool(self.object_ids) and (bool(given_ids) or is_due) and not is_last
        is_synchronised = self.deep_update_every < 0
        if is_synchronised:
            is_deep_due = is_memorised
        else:
            is_deep_due = self._frame_idx - self._last_deep_update_idx >= self.deep_update_every and not is_last
        plan = FramePlan(
            is_predicted=has_memory and len(given_ids) != len(self.object_ids),
            is_memorised=is_memorised,
            is_deeply_updated=is_memorised and is_deep_due,
            # As in XMem: with its own rhythm, the deep update comes on top of the one of every frame.
            is_sensory_updated=not is_last and not (is_synchronised and is_deep_due),
        )
        if plan.is_memorised:
            self._last_memory_idx = self._frame_idx
        if plan.is_deeply_updated:
            self._last_deep_update_idx = self._frame_idx
        return plan

    def add_sensory(self, sensory_dim: int, frame_key: Tensor) -> None:
        """Start the sensory memory of new objects at zero.

        Args:
            sensory_dim (`int`): its channels.
            frame_key (`torch.Tensor` of shape `(1, CK, h, w)`): gives its size, dtype and device.
        """
        num_known = 0 if self._sensory is None else self._sensory.shape[0]
        new = frame_key.new_zeros(len(self.object_ids) - num_known, sensory_dim, *frame_key.shape[-2:])
        self._sensory = new if self._sensory is None else torch.cat([self._sensory, new])

    def keep_objects(self, places: Sequence[int]) -> None:
        """Forget all objects but some; what is read of the others does not change.

        Args:
            places (sequence of `int`): places in `object_ids` of the objects that stay, ascending, at least one.

        Raises:
            RuntimeError: if the objects did not all enter on the same frame: the first ones' use of the memory decides
                for all what is kept of it.
        """
        if len(self._groups) > 1:
            raise RuntimeError(f"The objects entered on {len(self._groups)} frames, but only one can be told apart.")
        num_objects = len(self.object_ids)
        self.object_ids = [self.object_ids[place] for place in places]
        if self._sensory is not None:
            self._sensory = self._sensory[list(places)]
        for group in self._groups:
            group.value = group.value.unflatten(1, (num_objects, -1))[:, list(places)].flatten(1)
            group.num_objects = len(places)

    def read(self, frame_key: Tensor, selection: Tensor) -> Tensor:
        """Look up every position of a frame in working and long-term memory, and count what was used.

        Args:
            frame_key (`torch.Tensor` of shape `(CK, h, w)`): key of the frame.
            selection (`torch.Tensor` of shape `(CK, h, w)`, in [0, 1]): weight of each channel.

        Returns:
            `torch.Tensor` of shape `(N, CV, h, w)`.

        Raises:
            RuntimeError: if nothing has been memorised yet.
        """
        elements, expanded_key = self._elements, self._expanded_key
        if elements is None or expanded_key is None:
            raise RuntimeError(_NOTHING_YET)
        frame_size = frame_key.shape[-2:]
        positions = expand_frame_key(_rows(frame_key), _rows(selection))
        readouts: list[list[Tensor]] = [[] for _ in self._groups]
        for some_positions in positions.split(max(1, _MAX_SIMILARITIES // len(elements))):
            similarities = some_positions @ expanded_key.T
            for group_idx, group in enumerate(self._groups):
                affinity, best = top_k_softmax(self._columns_of(group, similarities), self.top_k)
                readouts[group_idx].append(weighted_sum(affinity.to(group.value.dtype), best, group.value))
                # The first group has a value for every element, so that its affinity is the usage of all.
                if self.use_long_term and group_idx == 0:
                    elements.usage += _summed_affinity(affinity, best, len(elements))
        elements.age += 1
        per_group = [
            torch.cat(parts).unflatten(1, (group.num_objects, -1))  # (P, objects of the group, CV)
            for parts, group in zip(readouts, self._groups, strict=True)
        ]
        return torch.cat(per_group, dim=1).permute(1, 2, 0).unflatten(2, frame_size)

    def add(self, key: Tensor, shrinkage: Tensor, selection: Tensor, value: Tensor) -> None:
        """Memorise a frame; consolidate working memory when it is full.

        Args:
            key (`torch.Tensor` of shape `(CK, h, w)`): key of the frame.
            shrinkage (`torch.Tensor` of shape `(1, h, w)`): its shrinkage.
            selection (`torch.Tensor` of shape `(CK, h, w)`): its selection, needed to consolidate.
            value (`torch.Tensor` of shape `(N, CV, h, w)`): values of all objects so far, in their order.
        """
        new = _Elements.new(_rows(key), _rows(shrinkage), _rows(selection))
        elements = new if self._elements is None else _Elements.cat([self._elements, new])

        first_object = 0
        for group in self._groups:
            new_value = _value_rows(value[first_object : first_object + group.num_objects])
            group.value = torch.cat([group.value, new_value])
            first_object += group.num_objects
        if first_object < value.shape[0]:
            self._groups.append(_Group(value.shape[0] - first_object, _value_rows(value[first_object:])))

        num_working = len(elements) - self._num_long_term
        if self.use_long_term and num_working >= self.max_working_frames * len(new):
            elements = self._make_room(elements, self.max_long_term_elements - self.num_prototypes)
            elements = self._consolidate(elements, len(new))
        self._elements = elements
        self._expanded_key = expand_memory_key(elements.key, elements.shrinkage)

    def _columns_of(self, group: _Group, similarities: Tensor) -> Tensor:
        """Similarities (P, L) with the elements that `group` has values for, in the order of its values."""
        num_elements = similarities.shape[1]
        long_term = similarities[:, self._num_long_term - group.num_long_term : self._num_long_term]
        working = similarities[:, num_elements - group.num_working :]
        if group.value.shape[0] == num_elements:
            return similarities
        return working if group.num_long_term == 0 else torch.cat([long_term, working], dim=1)

    def _make_room(self, elements: _Elements, max_elements: int) -> _Elements:
        """Drop long-term elements until `max_elements` are left: the least used, or the oldest."""
        num_long_term = self._num_long_term
        num_surplus = num_long_term - max_elements
        if num_surplus <= 0:
            return elements
        if self.count_long_term_usage:
            usage = elements.mean_usage[:num_long_term]
            # As in XMem: all elements go that are used no more than the last that has to, also more than needed.
            survives = usage > usage.topk(num_surplus, largest=False).values.max()
        else:
            survives = torch.arange(num_long_term, device=elements.key.device) >= num_surplus
        # Differs from XMem, which drops nothing when there are several groups.
        for group in self._groups:
            kept = group.long_term_value[survives[num_long_term - group.num_long_term :]]
            group.replace(kept, group.working_value)
        self._num_long_term = int(survives.sum())
        return _Elements.cat([elements[:num_long_term][survives], elements[num_long_term:]])

    def _consolidate(self, elements: _Elements, frame_elements: int) -> _Elements:
        """Turn all of working memory but the first and the last frames into prototypes (XMem section 3.3).

        The most used elements of the candidates give the prototypes' keys; their values and shrinkage are gathered
        from all candidates by similarity ("potentiation").
        """
        long_term, working = elements[: self._num_long_term], elements[self._num_long_term :]
        num_last = (self.min_working_frames - 1) * frame_elements
        first, last = working[:frame_elements], working[len(working) - num_last :]
        candidates = working[frame_elements : len(working) - num_last]

        # 1) Prototypes, and their similarity with all candidates.
        chosen = candidates.mean_usage.topk(min(self.num_prototypes, len(candidates))).indices
        prototypes = candidates[chosen]
        similarities = similarity(candidates.key, candidates.shrinkage, prototypes.key, prototypes.selection)

        # 2) Values, group by group: a late group has them for the last candidates only, or for none.
        for group in self._groups:
            value, prototype_value = group.working_value, group.long_term_value
            if group.num_working == len(working) or group.num_working > frame_elements + num_last + frame_elements:
                candidate_value = value[frame_elements : len(value) - num_last]
                num_missing = len(candidates) - len(candidate_value)
                # As in XMem: prototypes that a late group has no value for are left out, and its values then belong
                # to the last prototypes.
                affinity = similarities[chosen >= num_missing, num_missing:].softmax(dim=-1)
                new_value = affinity.to(value.dtype) @ candidate_value
                prototype_value = torch.cat([prototype_value, new_value])
            if group.num_working >= frame_elements + num_last + frame_elements:
                # As in XMem: a late group's first frame takes the place of the first frame of all.
                value = torch.cat([value[:frame_elements], value[len(value) - num_last :]])
            group.replace(prototype_value, value)

        # 3) Keys.
        shrinkage = similarities.softmax(dim=-1) @ candidates.shrinkage
        new = _Elements.new(prototypes.key, shrinkage, prototypes.selection)
        self._num_long_term += len(new)
        return _Elements.cat([long_term, new, first, last])


def _as_id(object_id: int) -> int:
    # NumPy's integers too.
    if isinstance(object_id, bool) or not isinstance(object_id, Integral):
        raise TypeError(f"`object_ids` contains {object_id!r} of type {type(object_id).__name__} but ids are `int`.")
    return int(object_id)


def _rows(plane: Tensor) -> Tensor:
    """(C, h, w) -> (h * w, C), float32: similarities need the precision."""
    return plane.flatten(1).T.float()


def _value_rows(value: Tensor) -> Tensor:
    """(n, CV, h, w) -> (h * w, n * CV)."""
    return value.permute(2, 3, 0, 1).flatten(2).flatten(0, 1)


def _summed_affinity(affinity: Tensor, elements: Tensor | None, num_elements: int) -> Tensor:
    """Sum of the affinity that each element got from all positions: (num_elements,)."""
    if elements is None:
        return affinity.sum(dim=0)
    units = (affinity / _USAGE_UNIT).long().flatten()
    sums = units.new_zeros(num_elements).index_add_(0, elements.flatten(), units)
    return (sums * _USAGE_UNIT).float()
