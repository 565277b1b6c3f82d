"""XMem, the tracker: carries masks given on one frame through a video (https://huggingface.co/papers/2207.07115).

Network only: key encoder, value encoder, decoder, and `XMemModel.step`, which runs them for one frame of a stream.
What is remembered lives in an `XMemMemory` (memory_xmem.py), one per video and direction. Frames are neither resized
nor normalised here; that is the caller's job.

Letters: B batch, N objects, H W pixels of the frame (multiples of 16 but in `step`), h w = H / 16, W / 16,
CK CV CS channels of keys, values and sensory memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_visa import XMemConfig
from .memory_xmem import XMemMemory

# The networks halve the frame four times.
STRIDE = 16
# CBAM's reduction in its channel gate (https://huggingface.co/papers/1807.06521).
_CHANNEL_REDUCTION = 16
# Pixels of the given masks that count as covered, on a frame where some objects are given and others predicted.
_MASK_THRESHOLD = 0.5


@dataclass(frozen=True)
class XMemFrameFeatures:
    """What the key encoder makes of B frames; depends on no object, so all queries on a frame can share it.

    Args:
        key (`torch.Tensor` of shape `(B, CK, h, w)`): where to look in memory, and what is stored of a memory frame.
        shrinkage (`torch.Tensor` of shape `(B, 1, h, w)`, at least 1): how sharply a stored element is matched.
        selection (`torch.Tensor` of shape `(B, CK, h, w)`, in [0, 1]): weight of each channel when this frame reads.
        f16, f8, f4 (`torch.Tensor`): features at strides 16, 8 and 4, channels as `key_encoder_dims` reversed.
    """

    key: Tensor
    shrinkage: Tensor
    selection: Tensor
    f16: Tensor
    f8: Tensor
    f4: Tensor


def aggregate(mask_probs: Tensor, dim: int) -> Tensor:
    """Combine independent probabilities of N objects into logits of background and objects.

    The background's probability is the product of 1 - p; each probability becomes log-odds, and their softmax over
    `dim` is the distribution (soft aggregation, XMem section 3.2; from STM).

    Args:
        mask_probs (`torch.Tensor`, in [0, 1]): dimension `dim` runs over the N objects.
        dim (`int`): that dimension.

    Returns:
        `torch.Tensor`, float32: log-odds, with N + 1 entries along `dim`, the background first.
    """
    mask_probs = mask_probs.float()
    background = torch.prod(1 - mask_probs, dim=dim, keepdim=True)
    probs = torch.cat([background, mask_probs], dim=dim).clamp(1e-7, 1 - 1e-7)
    return torch.log(probs / (1 - probs))


def pad_to_stride(image: Tensor) -> Tensor:
    """Pad the last two dimensions with zeros to multiples of 16, half on each side (the odd pixel right and below)."""
    top, left, height, width = _padding(image.shape[-2], image.shape[-1])
    bottom, right = height - top - image.shape[-2], width - left - image.shape[-1]
    return F.pad(image, (left, right, top, bottom))


def unpad(image: Tensor, height: int, width: int) -> Tensor:
    """Cut the last two dimensions back to what `pad_to_stride` was given."""
    top, left, _, _ = _padding(height, width)
    return image[..., top : top + height, left : left + width]


def _padding(height: int, width: int) -> tuple[int, int, int, int]:
    """Rows above, columns to the left, padded height, padded width."""
    padded_height, padded_width = (-(-side // STRIDE) * STRIDE for side in (height, width))
    return (padded_height - height) // 2, (padded_width - width) // 2, padded_height, padded_width


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def _add_shared(objects: Tensor, shared: Tensor) -> Tensor:
    """Add `shared` (B, C, h, w) to the features (B * N, C, h, w) of every object, in place."""
    objects.unflatten(0, (shared.shape[0], -1)).add_(shared.unsqueeze(1))
    return objects


def _updated_sensory(gates: Tensor, sensory: Tensor) -> Tensor:
    """XMem's variant of a GRU: the new value does not pass the forget gate. (M, 3 CS, h, w), (M, CS, h, w)."""
    forget, update, new = gates.chunk(3, dim=1)
    update = torch.sigmoid(update)
    return torch.sigmoid(forget) * sensory * (1 - update) + update * torch.tanh(new)


class XMemConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm; a single convolution where neither statistics nor gradients flow."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """(M, in, H, W) -> (M, out, H / stride, W / stride)."""
        conv, norm = self.conv, self.norm
        if norm.training or torch.is_grad_enabled():
            return norm(conv(features))
        assert norm.running_mean is not None and norm.running_var is not None
        # Folded anew each time, which costs little: a stored copy could outlive a change of the weights.
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        bias = norm.bias - norm.running_mean * scale
        return F.conv2d(features, conv.weight * scale[:, None, None, None], bias, conv.stride, conv.padding)


class XMemResNetBlock(nn.Module):
    """Residual block of a ResNet: 3x3, 3x3 ("basic") or 1x1, 3x3, 1x1 ("bottleneck", stride in the 3x3)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, layer: str) -> None:
        super().__init__()
        mid_channels = out_channels // 4
        if layer == "bottleneck":
            layers = [
                XMemConvNorm(in_channels, mid_channels, kernel_size=1),
                XMemConvNorm(mid_channels, mid_channels, kernel_size=3, stride=stride),
                XMemConvNorm(mid_channels, out_channels, kernel_size=1),
            ]
        else:
            layers = [
                XMemConvNorm(in_channels, out_channels, kernel_size=3, stride=stride),
                XMemConvNorm(out_channels, out_channels, kernel_size=3),
            ]
        self.layers = nn.ModuleList(layers)
        is_projected = stride != 1 or in_channels != out_channels
        self.shortcut = XMemConvNorm(in_channels, out_channels, kernel_size=1, stride=stride) if is_projected else None

    def forward(self, features: Tensor) -> Tensor:
        """(M, in, H, W) -> (M, out, H / stride, W / stride)."""
        residual = features if self.shortcut is None else self.shortcut(features)
        for layer in self.layers[:-1]:
            features = F.relu(layer(features), inplace=True)
        return F.relu(self.layers[-1](features).add_(residual), inplace=True)


class XMemResNet(nn.Module):
    """ResNet up to stride 16, in torchvision's layout.

    Not transformers' ResNetBackbone, which computes the same: with BatchNorm folded into the convolutions and the
    rest done in place, a frame takes about a third less time on a CPU.
    """

    def __init__(self, num_channels: int, layer: str, depths: Sequence[int], dims: Sequence[int]) -> None:
        super().__init__()
        channels = dims[0] // 4 if layer == "bottleneck" else dims[0]
        self.stem = XMemConvNorm(num_channels, channels, kernel_size=7, stride=2)
        self.stages = nn.ModuleList()
        for stage_idx, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            blocks = []
            for block_idx in range(depth):
                stride = 2 if stage_idx > 0 and block_idx == 0 else 1
                blocks.append(XMemResNetBlock(channels, dim, stride, layer))
                channels = dim
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, image: Tensor) -> list[Tensor]:
        """(M, num_channels, H, W) -> features at strides 4, 8 and 16."""
        features = F.relu(self.stem(image), inplace=True)
        features = F.max_pool2d(features, kernel_size=3, stride=2, padding=1)
        scales = []
        for stage in self.stages:
            features = stage(features)
            scales.append(features)
        return scales


class XMemResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, and a 3x3 shortcut where the number of channels changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.shortcut = _conv3x3(in_channels, out_channels) if in_channels != out_channels else None
        self.conv1 = _conv3x3(in_channels, out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """(M, in, h, w) -> (M, out, h, w)."""
        residual = self.conv2(F.relu(self.conv1(F.relu(features)), inplace=True))
        return residual.add_(features if self.shortcut is None else self.shortcut(features))

    def forward_pair(self, shared: Tensor, objects: Tensor) -> Tensor:
        """Run on the concatenation of `shared` (B, Cs, h, w), repeated N times, and `objects` (B * N, Co, h, w).

        A convolution of a concatenation is the sum of two: the frame's share is computed once for all objects.
        """
        hidden = self._conv_pair(self.conv1, F.relu(shared), F.relu(objects))
        residual = self.conv2(F.relu(hidden, inplace=True))
        if self.shortcut is not None:
            return residual.add_(self._conv_pair(self.shortcut, shared, objects))
        repeats = objects.shape[0] // shared.shape[0]
        return residual.add_(torch.cat([shared.repeat_interleave(repeats, dim=0), objects], dim=1))

    @staticmethod
    def _conv_pair(conv: nn.Conv2d, shared: Tensor, objects: Tensor) -> Tensor:
        split = shared.shape[1]
        of_shared = F.conv2d(shared, conv.weight[:, :split], conv.bias, padding=1)
        return _add_shared(F.conv2d(objects, conv.weight[:, split:], padding=1), of_shared)


class XMemAttention(nn.Module):
    """CBAM: a gate per channel, then a gate per position (https://huggingface.co/papers/1807.06521)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = max(channels // _CHANNEL_REDUCTION, 1)
        self.channel_reduce = nn.Linear(channels, reduced)
        self.channel_expand = nn.Linear(reduced, channels)
        self.spatial_conv = nn.Conv2d(2, 1, kernel_size=7, padding=3)

    def forward(self, features: Tensor) -> Tensor:
        """(M, C, h, w) -> (M, C, h, w)."""
        pooled = torch.stack([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))])  # (2, M, C)
        channel_gate = self.channel_expand(F.relu(self.channel_reduce(pooled))).sum(dim=0)
        features = features * torch.sigmoid(channel_gate)[:, :, None, None]
        pooled = torch.cat([features.amax(dim=1, keepdim=True), features.mean(dim=1, keepdim=True)], dim=1)
        return features * torch.sigmoid(self.spatial_conv(pooled))


class XMemFusion(nn.Module):
    """Fuse a frame's features with each object's: residual block, attention, residual block."""

    def __init__(self, frame_channels: int, object_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block1 = XMemResidualBlock(frame_channels + object_channels, out_channels)
        self.attention = XMemAttention(out_channels)
        self.block2 = XMemResidualBlock(out_channels, out_channels)

    def forward(self, frame_features: Tensor, object_features: Tensor) -> Tensor:
        """(B, Cf, h, w), (B * N, Co, h, w) -> (B * N, out, h, w)."""
        fused = self.block1.forward_pair(frame_features, object_features)
        return self.block2(fused + self.attention(fused))


class XMemKeyEncoder(nn.Module):
    """ResNet-50 up to stride 16 and the projections to key, shrinkage and selection."""

    def __init__(self, config: XMemConfig) -> None:
        super().__init__()
        self.backbone = XMemResNet(3, config.key_encoder_layer, config.key_encoder_depths, config.key_encoder_dims)
        channels = config.key_encoder_dims[-1]
        self.key_proj = _conv3x3(channels, config.key_dim)
        self.shrinkage_proj = _conv3x3(channels, 1)
        self.selection_proj = _conv3x3(channels, config.key_dim)

    def forward(self, frames: Tensor) -> XMemFrameFeatures:
        """(B, 3, H, W) -> features of the B frames."""
        f4, f8, f16 = self.backbone(frames)
        return XMemFrameFeatures(
            key=self.key_proj(f16),
            shrinkage=self.shrinkage_proj(f16) ** 2 + 1,
            selection=torch.sigmoid(self.selection_proj(f16)),
            f16=f16,
            f8=f8,
            f4=f4,
        )


class XMemDeepSensoryUpdate(nn.Module):
    """Update of the sensory memory from a new value, on memory frames."""

    def __init__(self, value_dim: int, sensory_dim: int) -> None:
        super().__init__()
        self.transform = _conv3x3(value_dim + sensory_dim, 3 * sensory_dim)

    def forward(self, value: Tensor, sensory: Tensor) -> Tensor:
        """(M, CV, h, w), (M, CS, h, w) -> (M, CS, h, w)."""
        return _updated_sensory(self.transform(torch.cat([value, sensory], dim=1)), sensory)


class XMemValueEncoder(nn.Module):
    """ResNet-18 over image, mask and the other objects' masks, fused with the key encoder's features."""

    def __init__(self, config: XMemConfig) -> None:
        super().__init__()
        self.single_object = config.single_object
        num_channels = 4 if config.single_object else 5
        self.backbone = XMemResNet(num_channels, "basic", config.value_encoder_depths, config.value_encoder_dims)
        self.fuser = XMemFusion(config.key_encoder_dims[-1], config.value_encoder_dims[-1], config.value_dim)
        self.sensory_update = XMemDeepSensoryUpdate(config.value_dim, config.sensory_dim)

    def forward(self, frames: Tensor, f16: Tensor, masks: Tensor, num_objects: Sequence[int] | None = None) -> Tensor:
        """(B, 3, H, W), (B, C, h, w), (B, N, H, W) -> values (B * N, CV, h, w).

        `num_objects` are those of each query, N in all, if an object is only to be told from those of its own query.
        """
        planes = [masks.unsqueeze(2)]
        if not self.single_object:
            per_query = masks.split([masks.shape[1]] if num_objects is None else list(num_objects), dim=1)
            others = [each.sum(dim=1, keepdim=True) - each for each in per_query]
            planes.append(torch.cat(others, dim=1).unsqueeze(2))
        frames = frames.unsqueeze(1).expand(-1, masks.shape[1], -1, -1, -1)
        inputs = torch.cat([frames, *planes], dim=2).flatten(0, 1)  # (B * N, 4 or 5, H, W)
        features = self.backbone(_channels_last(inputs))[-1]
        return self.fuser(f16, features)


class XMemSensoryUpdate(nn.Module):
    """Update of the sensory memory from the decoder's three scales, on every frame."""

    def __init__(self, dim_16: int, dim_8: int, dim_4: int, mid_dim: int, sensory_dim: int) -> None:
        super().__init__()
        self.conv_16 = nn.Conv2d(dim_16, mid_dim, kernel_size=1)
        self.conv_8 = nn.Conv2d(dim_8, mid_dim, kernel_size=1)
        self.conv_4 = nn.Conv2d(dim_4, mid_dim, kernel_size=1)
        self.transform = _conv3x3(mid_dim + sensory_dim, 3 * sensory_dim)

    def forward(self, g16: Tensor, g8: Tensor, g4: Tensor, sensory: Tensor) -> Tensor:
        """Features at strides 16, 8 and 4, sensory memory (M, CS, h, w) -> (M, CS, h, w)."""
        # Mean over 2x2 and 4x4: what "area" interpolation is for whole ratios.
        features = self.conv_16(g16) + self.conv_8(F.avg_pool2d(g8, 2)) + self.conv_4(F.avg_pool2d(g4, 4))
        return _updated_sensory(self.transform(torch.cat([features, sensory], dim=1)), sensory)


class XMemUpsample(nn.Module):
    """Double the resolution of the objects' features and add the frame's skip features."""

    def __init__(self, skip_channels: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.skip_conv = _conv3x3(skip_channels, in_channels)
        self.block = XMemResidualBlock(in_channels, out_channels)

    def forward(self, skip: Tensor, objects: Tensor) -> Tensor:
        """(B, skip, 2h, 2w), (B * N, in, h, w) -> (B * N, out, 2h, 2w)."""
        objects = F.interpolate(objects, scale_factor=2, mode="bilinear", align_corners=False)
        return self.block(_add_shared(objects, self.skip_conv(skip)))


class XMemDecoder(nn.Module):
    """From what was read in memory, the sensory memory and the frame's features to mask logits."""

    def __init__(self, config: XMemConfig) -> None:
        super().__init__()
        dim_4, dim_8, dim_16 = config.key_encoder_dims
        wide, narrow = config.decoder_dims
        self.fuser = XMemFusion(dim_16, config.value_dim + config.sensory_dim, wide)
        self.upsample_8 = XMemUpsample(dim_8, wide, narrow)
        self.upsample_4 = XMemUpsample(dim_4, narrow, narrow)
        self.mask_head = _conv3x3(narrow, 1)
        self.sensory_update = XMemSensoryUpdate(wide, narrow, narrow + 1, narrow, config.sensory_dim)

    def forward(
        self, features: XMemFrameFeatures, readout: Tensor, sensory: Tensor, update_sensory: bool
    ) -> tuple[Tensor, Tensor]:
        """Features of B frames, (B * N, CV, h, w), (B * N, CS, h, w) -> logits (B * N, 1, H, W), sensory memory."""
        g16 = self.fuser(features.f16, _channels_last(torch.cat([readout, sensory], dim=1)))
        g8 = self.upsample_8(features.f8, g16)
        g4 = self.upsample_4(features.f4, g8)
        logits = self.mask_head(F.relu(g4))
        if update_sensory:
            sensory = self.sensory_update(g16, g8, torch.cat([g4, logits], dim=1), sensory)
        return F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False), sensory


def _channels_last(image: Tensor) -> Tensor:
    # On a CPU the convolutions take and give this layout without reordering; it is passed on from layer to layer.
    return image.contiguous(memory_format=torch.channels_last)


class XMemModel(PreTrainedModel):
    """XMem: tracks the masks given on some frames of a video through the others.

    For a stream of frames use `init_memory` and `step`. `encode_key`, `encode_value` and `segment` are the parts, for
    batches, with gradients.
    """

    config: XMemConfig
    base_model_prefix = "tracker"
    main_input_name = "frames"
    _no_split_modules = ["XMemModel", "XMemKeyEncoder", "XMemValueEncoder", "XMemDecoder"]

    def __init__(self, config: XMemConfig) -> None:
        super().__init__(config)
        self.key_encoder = XMemKeyEncoder(config)
        self.value_encoder = XMemValueEncoder(config)
        self.decoder = XMemDecoder(config)
        self.post_init()
        self.train(self.training)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            if module.bias is None:  # the ResNets' convolutions
                init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            else:
                # PyTorch's own, as XMem has it.
                init.kaiming_uniform_(module.weight, a=5**0.5)

    def train(self, mode: bool = True) -> "XMemModel":
        """Set training mode; BatchNorm follows only with `config.train_batch_norm`."""
        super().train(mode)
        if not self.config.train_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def encode_key(self, frames: Tensor) -> XMemFrameFeatures:
        """Compute what depends on the frames alone.

        Args:
            frames (`torch.Tensor` of shape `(B, 3, H, W)`): RGB in [0, 1], normalised with ImageNet's mean and
                standard deviation; H and W multiples of 16.
        """
        return self.key_encoder(_channels_last(frames))

    def encode_value(
        self, frames: Tensor, f16: Tensor, masks: Tensor, sensory: Tensor, *, deep_update: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Compute the values that a memory frame stores, and the deep update of the sensory memory.

        Args:
            frames (`torch.Tensor` of shape `(B, 3, H, W)`): normalised frames.
            f16 (`torch.Tensor` of shape `(B, C, h, w)`): stride-16 features of `encode_key`.
            masks (`torch.Tensor` of shape `(B, N, H, W)`, in [0, 1]): probabilities of the objects.
            sensory (`torch.Tensor` of shape `(B, N, CS, h, w)`): sensory memory.
            deep_update (`bool`): without it the sensory memory is returned as it is.

        Returns:
            Values of shape `(B, N, CV, h, w)` and the sensory memory, of shape `(B, N, CS, h, w)`.
        """
        size = masks.shape[:2]
        value = self.value_encoder(frames, f16, masks)
        if deep_update:
            sensory = self.value_encoder.sensory_update(value, sensory.flatten(0, 1)).unflatten(0, size)
        return value.unflatten(0, size), sensory

    def segment(
        self, features: XMemFrameFeatures, readout: Tensor, sensory: Tensor, *, update_sensory: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Decode the masks of B frames.

        Args:
            features (`XMemFrameFeatures`): of `encode_key`.
            readout (`torch.Tensor` of shape `(B, N, CV, h, w)`): what each position read from memory.
            sensory (`torch.Tensor` of shape `(B, N, CS, h, w)`): sensory memory.
            update_sensory (`bool`): without it the sensory memory is returned as it is.

        Returns:
            Logits of shape `(B, 1 + N, H, W)`, float32, the background first, whose softmax over dimension 1 are the
            probabilities; and the sensory memory, of shape `(B, N, CS, h, w)`.
        """
        size = readout.shape[:2]
        logits, updated = self.decoder(features, readout.flatten(0, 1), sensory.flatten(0, 1), update_sensory)
        mask_probs = torch.sigmoid(logits.squeeze(1).unflatten(0, size).float())
        return aggregate(mask_probs, dim=1), updated.unflatten(0, size)

    def init_memory(self) -> XMemMemory:
        """Return an empty memory for one video and one direction of going through it."""
        config = self.config
        return XMemMemory(
            memory_every=config.memory_every,
            deep_update_every=config.deep_update_every,
            top_k=config.top_k,
            use_long_term=config.use_long_term,
            count_long_term_usage=config.count_long_term_usage,
            min_working_frames=config.min_working_frames,
            max_working_frames=config.max_working_frames,
            num_prototypes=config.num_prototypes,
            max_long_term_elements=config.max_long_term_elements,
        )

    @torch.no_grad()
    def encode_frame(self, frame: Tensor) -> XMemFrameFeatures:
        """Compute `encode_key` of one frame of any size, for `step(..., features=...)` of several memories.

        Args:
            frame (`torch.Tensor` of shape `(3, H, W)`): as `step` takes it.

        Raises:
            ValueError, TypeError: as `step`.
        """
        _check_frame(frame)
        return self.encode_key(pad_to_stride(frame.to(self.device, self.dtype)).unsqueeze(0))

    @torch.no_grad()
    def step(
        self,
        memory: XMemMemory,
        frame: Tensor,
        masks: Tensor | None = None,
        object_ids: Sequence[int] | None = None,
        is_last: bool = False,
        *,
        features: XMemFrameFeatures | None = None,
    ) -> Tensor:
        """Track all objects of `memory` into the next frame, and take up the masks that are given on it.

        Frames may be stepped in any order of time; one memory goes one way. On a frame with masks, their pixels clear
        the predictions of all objects there; objects without a mask keep the rest of theirs. Where every object is
        given, nothing is predicted.

        Args:
            memory (`XMemMemory`): of `init_memory`; changed in place.
            frame (`torch.Tensor` of shape `(3, H, W)`, floating point): RGB in [0, 1], normalised with ImageNet's mean
                and standard deviation; any size, the same for all frames of a memory.
            masks (`torch.Tensor` of shape `(K, H, W)`, bool or numbers in [0, 1], *optional*): masks of K objects.
            object_ids (sequence of K `int`, *optional*): whose masks they are; a new id is a new object. By default
                1..K for the first masks, later all objects in the order in which they entered.
            is_last (`bool`): nothing comes after this frame, so it is not memorised.
            features (`XMemFrameFeatures`, *optional*): of `encode_frame` for this very frame, to share between
                memories.

        Returns:
            `torch.Tensor` of shape `(1 + number of objects so far, H, W)`, float32: probabilities, the background
            first, then the objects in the order in which they entered (`memory.object_ids`).

        Raises:
            ValueError, TypeError: for a frame, masks or ids that do not fit; the memory is unchanged.
            RuntimeError: if the memory has seen its last frame.
        """
        # 0) Check at the border; the memory is untouched when this raises.
        _check_frame(frame)
        height, width = frame.shape[-2:]
        memory.check_frame_size(height, width)
        if masks is not None:
            _check_masks(masks, frame)
            if len(masks) == 0 and (object_ids is None or len(object_ids) == 0):
                masks = object_ids = None
        if features is not None:
            _check_features(features, height, width)
        given_ids = memory.resolve_ids(None if masks is None else masks.shape[0], object_ids)

        # 1) What does this frame need?
        plan = memory.begin_frame((height, width), given_ids, is_last)
        if not memory.object_ids:
            return torch.ones(1, height, width, device=self.device)
        if features is None:
            features = self.encode_frame(frame)

        # 2) Predict from memory.
        probs = None
        if plan.is_predicted:
            readout = memory.read(features.key[0], features.selection[0])
            logits, sensory = self.segment(
                features, readout[None].to(self.dtype), memory.sensory[None], update_sensory=plan.is_sensory_updated
            )
            probs = logits[0].softmax(dim=0)  # (1 + objects known before, H, W), padded
            memory.sensory = sensory[0]

        # 3) Take up the given masks.
        if masks is not None:
            given = pad_to_stride(masks.to(self.device, torch.float32))
            rows = [memory.object_ids.index(object_id) for object_id in given_ids]
            probs = _merge(probs, given, rows, len(memory.object_ids)).softmax(dim=0)
            memory.add_sensory(self.config.sensory_dim, features.key)

        assert probs is not None  # an object without a mask on this frame was predicted

        # 4) Memorise.
        if plan.is_memorised:
            padded = pad_to_stride(frame.to(self.device, self.dtype)).unsqueeze(0)
            mask_probs = probs[None, 1:].to(self.dtype)
            value, sensory = self.encode_value(
                padded, features.f16, mask_probs, memory.sensory[None], deep_update=plan.is_deeply_updated
            )
            memory.add(features.key[0], features.shrinkage[0], features.selection[0], value[0])
            memory.sensory = sensory[0]

        # 5) Back to the frame's own size.
        return unpad(probs, height, width).contiguous()

    @torch.no_grad()
    def step_queries(
        self,
        memory: XMemMemory,
        frame: Tensor,
        num_objects: Sequence[int],
        masks: Tensor | None = None,
        is_last: bool = False,
        *,
        features: XMemFrameFeatures | None = None,
        max_queries: int = 8,
    ) -> list[Tensor]:
        """Track several queries that begin on the same frame, as if each had a memory of its own, at less cost.

        What is stored of a frame, what each position reads and what is consolidated depend on the frames alone once
        the memory frames are the same; so they are computed once. Values, sensory memory and aggregation are each
        query's own: its objects do not compete with those of another.

        Args:
            memory (`XMemMemory`): of `init_memory`; changed in place. It is stepped with this method only.
            frame, is_last, features: as in `step`.
            num_objects (sequence of E `int`, at least 1 each): objects of each query. Queries may be taken out
                between two steps, with `memory.keep_objects`.
            masks (`torch.Tensor` of shape `(N, H, W)`, bool or numbers in [0, 1]): masks of all N objects, query after
                query, on the first frame; on no other.
            max_queries (`int`, defaults to 8): queries that go through the networks together, which bounds memory.

        Returns:
            list of E `torch.Tensor` of shape `(1 + num_objects[e], H, W)`, float32: probabilities, as of `step`.

        Raises:
            ValueError, TypeError, RuntimeError: as `step`, and if the numbers of objects do not fit the masks or the
                memory, or masks are given on a later frame, or none on the first.
        """
        # 0) Check at the border.
        _check_frame(frame)
        height, width = frame.shape[-2:]
        memory.check_frame_size(height, width)
        if masks is not None:
            _check_masks(masks, frame)
        if features is not None:
            _check_features(features, height, width)
        if (masks is None) != bool(memory.object_ids):
            raise ValueError("`masks` are needed on the first frame, and on no other. Use `step` for later masks.")
        expected = len(memory.object_ids) if masks is None else len(masks)
        if sum(num_objects) != expected or min(num_objects, default=0) < 1:
            raise ValueError(
                f"`num_objects` is {list(num_objects)} but there are {expected} objects. Give the number of each "
                "query, at least 1."
            )

        # 1) What does this frame need?
        given_ids = memory.resolve_ids(None if masks is None else len(masks), None)
        plan = memory.begin_frame((height, width), given_ids, is_last)
        features = self.encode_frame(frame) if features is None else features
        parts = _parts(num_objects, max_queries)

        # 2) Take up the masks, or predict from memory.
        probs: list[Tensor] = []
        if masks is not None:
            given = pad_to_stride(masks.to(self.device, torch.float32))
            probs = [aggregate(of_query, dim=0).softmax(dim=0) for of_query in given.split(list(num_objects))]
            memory.add_sensory(self.config.sensory_dim, features.key)
        else:
            readout = memory.read(features.key[0], features.selection[0]).to(self.dtype)
            updated = []
            for rows, sizes in parts:
                logits, sensory = self.decoder(features, readout[rows], memory.sensory[rows], plan.is_sensory_updated)
                mask_probs = torch.sigmoid(logits.squeeze(1).float())
                probs += [aggregate(of_query, dim=0).softmax(dim=0) for of_query in mask_probs.split(sizes)]
                updated.append(sensory)
            memory.sensory = torch.cat(updated)

        # 3) Memorise.
        if plan.is_memorised:
            padded = pad_to_stride(frame.to(self.device, self.dtype)).unsqueeze(0)
            mask_probs = torch.cat([of_query[1:] for of_query in probs]).to(self.dtype)
            values, updated = [], []
            for rows, sizes in parts:
                value = self.value_encoder(padded, features.f16, mask_probs[None, rows], sizes)
                sensory = memory.sensory[rows]
                if plan.is_deeply_updated:
                    sensory = self.value_encoder.sensory_update(value, sensory)
                values.append(value)
                updated.append(sensory)
            memory.add(features.key[0], features.shrinkage[0], features.selection[0], torch.cat(values))
            memory.sensory = torch.cat(updated)
        return [unpad(of_query, height, width).contiguous() for of_query in probs]


def _parts(num_objects: Sequence[int], max_queries: int) -> list[tuple[slice, list[int]]]:
    """Cut queries into parts of at most `max_queries`: the rows of their objects, and how many each query has."""
    parts, start = [], 0
    for first in range(0, len(num_objects), max_queries):
        sizes = list(num_objects[first : first + max_queries])
        parts.append((slice(start, start + sum(sizes)), sizes))
        start += sum(sizes)
    return parts


def _merge(probs: Tensor | None, masks: Tensor, rows: list[int], num_objects: int) -> Tensor:
    """Aggregate the given masks with what was predicted: (1 + P, H, W) or None, (K, H, W) -> logits (1 + N, H, W)."""
    merged = masks.new_zeros(num_objects, *masks.shape[-2:])
    if probs is not None:
        is_given = masks.sum(dim=0) > _MASK_THRESHOLD
        merged[: probs.shape[0] - 1] = probs[1:].masked_fill(is_given, 0.0)
    merged[rows] = masks
    return aggregate(merged, dim=0)


def _check_is_tensor(value: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` is a {type(value).__name__} but must be a `torch.Tensor`. Convert it first.")


def _check_frame(frame: Tensor) -> None:
    _check_is_tensor(frame, "frame")
    if frame.ndim != 3 or frame.shape[0] != 3 or 0 in frame.shape:
        raise ValueError(f"`frame` has shape {tuple(frame.shape)} but must be (3, H, W). Give one RGB frame.")
    if not frame.is_floating_point():
        raise TypeError(
            f"`frame` has dtype {frame.dtype} but must be floating point. Scale it to [0, 1] and normalise it first."
        )
    if not torch.isfinite(frame).all():
        raise ValueError("`frame` has values that are NaN or infinite. Give finite numbers.")


def _check_masks(masks: Tensor, frame: Tensor) -> None:
    _check_is_tensor(masks, "masks")
    if masks.ndim != 3 or masks.shape[-2:] != frame.shape[-2:]:
        raise ValueError(
            f"`masks` has shape {tuple(masks.shape)} but `frame` is {frame.shape[1]} x {frame.shape[2]} pixels. "
            "Give masks of shape (K, H, W), of the frame's size."
        )
    if masks.is_complex():
        raise TypeError(f"`masks` has dtype {masks.dtype} but must be bool or real numbers.")
    if masks.dtype != torch.bool and not ((masks >= 0) & (masks <= 1)).all():
        raise ValueError(
            f"`masks` has values from {masks.min().item()} to {masks.max().item()} but they must be in [0, 1]. "
            "Give a bool mask or probabilities per object."
        )


def _check_features(features: XMemFrameFeatures, height: int, width: int) -> None:
    _, _, padded_height, padded_width = _padding(height, width)
    expected = (1, padded_height // STRIDE, padded_width // STRIDE)
    if (features.key.shape[0], *features.key.shape[-2:]) != expected:
        raise ValueError(
            f"`features` has a key of shape {tuple(features.key.shape)} but (1, CK, {expected[1]}, {expected[2]}) is "
            "needed. Give `encode_frame` of this very frame."
        )
