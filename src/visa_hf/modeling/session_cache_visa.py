"""What a video session keeps of what was computed once: bounded, on a device and in a dtype of choice.

Visual tokens of frames, SAM's features of target frames, and prefixes of the language model. None of it depends on a
query. Nothing is computed here, and nothing of the tracker is kept.
"""

import weakref
from collections import OrderedDict
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .prefix_cache_visa import SharedPrefix

Kept = TypeVar("Kept")


class RecentItems(Generic[Kept]):
    """Items by key; with more than `max_items`, the one that was not asked for longest goes."""

    def __init__(self, max_items: int) -> None:
        self.max_items = max_items
        self._items: OrderedDict[Any, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: Any) -> Kept | None:
        """Return an item, or `None` if it is not here (any more)."""
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key]

    def put(self, key: Any, item: Kept) -> None:
        """Keep an item."""
        self._items[key] = item
        self._items.move_to_end(key)
        while len(self._items) > self.max_items:
            self._items.popitem(last=False)

    def clear(self) -> None:
        """Let go of all items."""
        self._items.clear()


class SessionCache:
    """What is kept of one session's frames.

    Args:
        max_frames (`int`): frames whose visual tokens are kept.
        max_targets (`int`): target frames whose SAM features are kept.
        max_prefixes (`int`): sets of frames whose prefix of the language model is kept: the largest by far, 0.5 MB a
            token in the 7B model, above 1,000 tokens.
        device, dtype (*optional*): where and what they are kept as; as they were computed by default, which alone is
            sure to change no mask.

    Attributes:
        frames (`RecentItems` of `torch.Tensor` of shape `(L, D)`): visual tokens, by frame.
        targets (`RecentItems` of `torch.Tensor` of shape `(C, h, w)`): SAM's features, by frame.
        prefixes (`RecentItems` of `SharedPrefix`): by reference frames and target, `None` for no target.
        reshaped_size (`tuple[int, int]` or `None`): (H, W) in pixels of the session's frames inside SAM's square.
    """

    def __init__(
        self,
        *,
        max_frames: int,
        max_targets: int,
        max_prefixes: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.frames: RecentItems[Tensor] = RecentItems(max_frames)
        self.targets: RecentItems[Tensor] = RecentItems(max_targets)
        self.prefixes: RecentItems[SharedPrefix] = RecentItems(max_prefixes)
        self.reshaped_size: tuple[int, int] | None = None
        self._model: weakref.ref[Any] | None = None
        self._kind: tuple[Any, ...] = ()

    def serve(self, model: Any) -> None:
        """Let go of everything that another model, or this one elsewhere or in another dtype, has computed.

        Weights that change in place go unnoticed: call `clear` then.
        """
        kind = (model.device, model.dtype)
        if self._model is None or self._model() is not model or self._kind != kind:
            self.clear()
            self._model, self._kind = weakref.ref(model), kind

    def stored(self, tensor: Tensor) -> Tensor:
        """Return `tensor` as it is kept, not a view of something larger."""
        kept = tensor.detach().to(self.device or tensor.device, self.dtype or tensor.dtype)
        return kept.clone() if kept.untyped_storage().nbytes() > kept.nbytes else kept

    def clear(self) -> None:
        """Let go of everything."""
        for items in (self.frames, self.targets, self.prefixes):
            items.clear()
        self.reshaped_size = None
        self._model = None
