"""Plain transcription of XMem's published step: the slow version that the model is compared and timed against.

Written from the paper (https://huggingface.co/papers/2207.07115) and from what the published code computes, in its
order and with its tensor layout: dense affinity over a copy of all memory, top-k along the memory dimension, one
feature map per object with the frame's features repeated. It takes the networks' weights from an `XMemModel`, and it
keeps XMem's defects: it needs at least `top_k` elements, drops elements only for one group of objects and only when
usage is counted. Tests and the benchmark use it; the package does not.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from visa_hf.modeling.modeling_xmem import XMemModel


def get_similarity(memory_key: Tensor, shrinkage: Tensor, frame_key: Tensor, selection: Tensor) -> Tensor:
    """(1, CK, L), (1, 1, L), (1, CK, P), (1, CK, P) -> (1, L, P)."""
    keys = memory_key.transpose(1, 2)
    squared = keys.pow(2) @ selection
    mixed = 2 * (keys @ (frame_key * selection))
    constant = (selection * frame_key.pow(2)).sum(1, keepdim=True)
    return (-squared + mixed - constant) * shrinkage.transpose(1, 2) / math.sqrt(memory_key.shape[1])


def get_affinity(similarity: Tensor, top_k: int | None = None) -> Tensor:
    """Softmax over dimension 1 of (1, L, P), of the best `top_k` elements only; the others get 0."""
    if top_k is None:
        weights = torch.exp(similarity - similarity.max(dim=1, keepdim=True).values)
        return weights / weights.sum(dim=1, keepdim=True)
    values, indices = torch.topk(similarity, k=top_k, dim=1)
    weights = values.exp()
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.zeros_like(similarity).scatter_(1, indices, weights)


def soft_aggregate(mask_probs: Tensor) -> Tensor:
    """(N, H, W) -> probabilities (1 + N, H, W)."""
    background = torch.prod(1 - mask_probs, dim=0, keepdim=True)
    probs = torch.cat([background, mask_probs]).clamp(1e-7, 1 - 1e-7)
    return F.softmax(torch.log(probs / (1 - probs)), dim=0)


def gru(values: Tensor, sensory: Tensor) -> Tensor:
    """XMem's gates: (N, 3 CS, h, w), (N, CS, h, w) -> (N, CS, h, w)."""
    size = sensory.shape[1]
    forget, update = torch.sigmoid(values[:, :size]), torch.sigmoid(values[:, size : 2 * size])
    return forget * sensory * (1 - update) + update * torch.tanh(values[:, 2 * size :])


class ReferenceNetwork:
    """The networks' published forward passes, one convolution after another, on an `XMemModel`'s weights."""

    def __init__(self, model: XMemModel) -> None:
        self.key, self.value, self.decoder = model.key_encoder, model.value_encoder, model.decoder

    def encode_key(self, image: Tensor) -> tuple[Tensor, ...]:
        f4, f8, f16 = self.resnet(self.key.backbone, image)
        shrinkage = self.key.shrinkage_proj(f16) ** 2 + 1
        return self.key.key_proj(f16), shrinkage, torch.sigmoid(self.key.selection_proj(f16)), f16, f8, f4

    def encode_value(self, image: Tensor, f16: Tensor, sensory: Tensor, masks: Tensor, deep: bool) -> tuple:
        """(1, 3, H, W), (1, C, h, w), (N, CS, h, w), (N, H, W) -> (N, CV, h, w), (N, CS, h, w)."""
        inputs = []
        for i in range(len(masks)):
            others = sum((masks[j] for j in range(len(masks)) if j != i), torch.zeros_like(masks[i]))
            planes = [masks[i]] if self.value.single_object else [masks[i], others]
            inputs.append(torch.cat([image[0], torch.stack(planes)]))
        features = self.resnet(self.value.backbone, torch.stack(inputs))[-1]
        value = self.fuse(self.value.fuser, f16, features)
        if deep:
            sensory = gru(self.value.sensory_update.transform(torch.cat([value, sensory], 1)), sensory)
        return value, sensory

    def segment(self, f16: Tensor, f8: Tensor, f4: Tensor, readout: Tensor, sensory: Tensor) -> tuple:
        """Features, (N, CV, h, w), (N, CS, h, w) -> probabilities (N, H, W), (N, CS, h, w)."""
        decoder, update = self.decoder, self.decoder.sensory_update
        g16 = self.fuse(decoder.fuser, f16, torch.cat([readout, sensory], 1))
        g8 = self.upsample(decoder.upsample_8, f8, g16)
        g4 = self.upsample(decoder.upsample_4, f4, g8)
        logits = decoder.mask_head(F.relu(g4))
        scales = update.conv_16(g16) + update.conv_8(F.interpolate(g8, scale_factor=1 / 2, mode="area"))
        scales = scales + update.conv_4(F.interpolate(torch.cat([g4, logits], 1), scale_factor=1 / 4, mode="area"))
        sensory = gru(update.transform(torch.cat([scales, sensory], 1)), sensory)
        logits = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
        return torch.sigmoid(logits[:, 0]), sensory

    def upsample(self, block: torch.nn.Module, skip: Tensor, objects: Tensor) -> Tensor:
        objects = F.interpolate(objects, scale_factor=2, mode="bilinear", align_corners=False)
        return self.residual(block.block, block.skip_conv(skip) + objects)

    def fuse(self, fuser: torch.nn.Module, frame_features: Tensor, objects: Tensor) -> Tensor:
        repeated = frame_features.expand(len(objects), -1, -1, -1)
        x = self.residual(fuser.block1, torch.cat([repeated, objects], 1))
        gate = fuser.attention
        size = x.shape[-2:]
        average, maximum = F.avg_pool2d(x, size).flatten(1), F.max_pool2d(x, size).flatten(1)
        channel = sum(gate.channel_expand(F.relu(gate.channel_reduce(pooled))) for pooled in (average, maximum))
        gated = x * torch.sigmoid(channel)[:, :, None, None]
        pooled = torch.stack([gated.max(dim=1).values, gated.mean(dim=1)], 1)
        gated = gated * torch.sigmoid(gate.spatial_conv(pooled))
        return self.residual(fuser.block2, x + gated)

    @staticmethod
    def residual(block: torch.nn.Module, x: Tensor) -> Tensor:
        residual = block.conv2(F.relu(block.conv1(F.relu(x))))
        return residual + (x if block.shortcut is None else block.shortcut(x))

    @staticmethod
    def resnet(backbone: torch.nn.Module, x: Tensor) -> list[Tensor]:
        x = F.relu(backbone.stem.norm(backbone.stem.conv(x)))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        stages = []
        for stage in backbone.stages:
            for block in stage:
                residual = x if block.shortcut is None else block.shortcut.norm(block.shortcut.conv(x))
                for layer in block.layers[:-1]:
                    x = F.relu(layer.norm(layer.conv(x)))
                last = block.layers[-1]
                x = F.relu(last.norm(last.conv(x)) + residual)
            stages.append(x)
        return stages


class Store:
    """Elements of one memory: keys (1, C, L), values per group (N_g, CV, L_g), usage and life counts."""

    def __init__(self, count_usage: bool) -> None:
        self.count_usage = count_usage
        self.key = self.shrinkage = self.selection = self.use_count = self.life_count = None
        self.value: list[Tensor] = []

    @property
    def size(self) -> int:
        return 0 if self.key is None else self.key.shape[-1]

    def add_keys(self, key: Tensor, shrinkage: Tensor, selection: Tensor | None) -> None:
        use = torch.zeros(1, 1, key.shape[-1])
        if self.key is None:
            self.key, self.shrinkage, self.selection = key, shrinkage, selection
            self.use_count, self.life_count = use, use + 1e-7
            return
        self.key, self.shrinkage = torch.cat([self.key, key], -1), torch.cat([self.shrinkage, shrinkage], -1)
        if selection is not None:
            self.selection = torch.cat([self.selection, selection], -1)
        self.use_count = torch.cat([self.use_count, use], -1)
        self.life_count = torch.cat([self.life_count, use + 1e-7], -1)

    def update_usage(self, usage: Tensor) -> None:
        if self.count_usage:
            self.use_count = self.use_count + usage.view_as(self.use_count)
            self.life_count = self.life_count + 1

    @property
    def usage(self) -> Tensor:
        return self.use_count / self.life_count

    def sieve_by_range(self, start: int, end: int, min_size: int) -> None:
        def sieve(x: Tensor) -> Tensor:
            return torch.cat([x[..., :start], x[..., end:]], -1)

        self.key, self.shrinkage, self.selection = sieve(self.key), sieve(self.shrinkage), sieve(self.selection)
        self.use_count, self.life_count = sieve(self.use_count), sieve(self.life_count)
        self.value = [sieve(v) if v.shape[-1] >= min_size else v for v in self.value]

    def remove_obsolete_features(self, max_size: int) -> None:
        usage = self.usage.flatten()
        survived = usage > torch.topk(usage, k=self.size - max_size, largest=False).values[-1]
        if len(self.value) > 1:
            raise RuntimeError("XMem drops elements only when there is one group of objects.")
        self.key, self.shrinkage = self.key[..., survived], self.shrinkage[..., survived]
        self.use_count, self.life_count = self.use_count[..., survived], self.life_count[..., survived]
        self.value = [v[..., survived] for v in self.value]


class ReferenceTracker:
    """One video in one direction, as XMem's own inference: `step` takes all masks of a frame and who they belong to.

    `masks` (N, H, W) has a row for every object so far, in order of entering (zeros where none is given); `given`
    holds the row numbers of those that are.
    """

    def __init__(self, model: XMemModel) -> None:
        self.network, self.config = ReferenceNetwork(model), model.config
        self.frame_idx, self.last_memory_idx = -1, 0
        self.last_deep_idx = -self.config.deep_update_every
        self.num_objects, self.group_sizes = 0, []
        self.sensory: Tensor | None = None
        self.working, self.long = Store(self.config.use_long_term), Store(self.config.count_long_term_usage)

    @torch.no_grad()
    def step(self, frame: Tensor, masks: Tensor | None = None, given: list[int] | None = None, end: bool = False):
        self.frame_idx += 1
        config, network = self.config, self.network
        height, width = frame.shape[-2:]
        pad_h, pad_w = -height % 16, -width % 16
        padding = (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2)
        image = F.pad(frame, padding)[None]
        if masks is not None:
            self.num_objects = len(masks)

        is_memory = (self.frame_idx - self.last_memory_idx >= config.memory_every or masks is not None) and not end
        is_synchronised = config.deep_update_every < 0
        if is_synchronised:
            is_deep = is_memory
        else:
            is_deep = self.frame_idx - self.last_deep_idx >= config.deep_update_every and not end
        is_normal = (not is_synchronised or not is_deep) and not end
        need_segment = self.frame_idx > 0 and (masks is None or len(given) != self.num_objects)

        key, shrinkage, selection, f16, f8, f4 = network.encode_key(image)
        prediction = probs = None
        if need_segment:
            readout = self.match_memory(key, selection)
            prediction, sensory = network.segment(f16, f8, f4, readout, self.sensory)
            probs = soft_aggregate(prediction)
            if is_normal:
                self.sensory = sensory
        if masks is not None:
            masks = F.pad(masks.float(), padding)
            if probs is not None:
                predicted = probs[1:].clone()
                predicted[:, masks.sum(0) > 0.5] = 0
                for i in range(len(predicted)):
                    if i not in given:
                        masks[i] = predicted[i]
            probs = soft_aggregate(masks)
            new = torch.zeros(
                self.num_objects - (0 if self.sensory is None else len(self.sensory)),
                config.sensory_dim,
                *key.shape[-2:],
            )
            self.sensory = new if self.sensory is None else torch.cat([self.sensory, new])
        if is_memory:
            value, sensory = network.encode_value(image, f16, self.sensory, probs[1:], is_deep)
            self.add_memory(key.flatten(2), shrinkage.flatten(2), selection.flatten(2), value.flatten(2))
            self.last_memory_idx = self.frame_idx
            if is_deep:
                self.sensory, self.last_deep_idx = sensory, self.frame_idx
        return probs[:, padding[2] : padding[2] + height, padding[0] : padding[0] + width]

    def match_memory(self, key: Tensor, selection: Tensor) -> Tensor:
        height, width = key.shape[-2:]
        working, long = self.working, self.long
        keys, shrinkage = working.key, working.shrinkage
        if long.size:
            keys, shrinkage = torch.cat([long.key, keys], -1), torch.cat([long.shrinkage, shrinkage], -1)
        similarity = get_similarity(keys, shrinkage, key.flatten(2), selection.flatten(2))
        readouts = []
        for g, value in enumerate(working.value):
            of_group = similarity[:, similarity.shape[1] - value.shape[-1] :]
            if g < len(long.value):
                of_long = similarity[:, long.size - long.value[g].shape[-1] : long.size]
                of_group = torch.cat([of_long, of_group], 1)
                value = torch.cat([long.value[g], value], -1)
            affinity = get_affinity(of_group, self.config.top_k)
            readouts.append(value @ affinity)  # (N_g, CV, P)
            if g == 0 and self.config.use_long_term:
                usage = affinity.sum(dim=2)
                working.update_usage(usage[:, long.size :])
                if long.size:
                    long.update_usage(usage[:, : long.size])
        return torch.cat(readouts).unflatten(-1, (height, width))

    def add_memory(self, key: Tensor, shrinkage: Tensor, selection: Tensor, value: Tensor) -> None:
        working, long, config = self.working, self.long, self.config
        working.add_keys(key, shrinkage, selection)
        first = 0
        for g, size in enumerate(self.group_sizes):
            working.value[g] = torch.cat([working.value[g], value[first : first + size]], -1)
            first += size
        if first < len(value):
            self.group_sizes.append(len(value) - first)
            working.value.append(value[first:])

        frame = key.shape[-1]
        if config.use_long_term and working.size >= config.max_working_frames * frame:
            room = config.max_long_term_elements - config.num_prototypes
            if long.size >= room and long.size - room > 0:
                long.remove_obsolete_features(room)
            self.compress(frame)

    def compress(self, frame: int) -> None:
        working, long = self.working, self.long
        start, min_size = frame, self.config.min_working_frames * frame
        end = -min_size + frame
        candidates = [
            v[..., start:end] if v.shape[-1] == working.size or v.shape[-1] > min_size + frame else None
            for v in working.value
        ]
        key, shrinkage = working.key[..., start:end], working.shrinkage[..., start:end]
        selection, usage = working.selection[..., start:end], working.usage[..., start:end]
        num = key.shape[-1]
        chosen = torch.topk(usage, k=self.config.num_prototypes, dim=-1).indices.flatten()
        similarity = get_similarity(key, shrinkage, key[..., chosen], selection[..., chosen])
        for g, value in enumerate(candidates):
            if value is None:
                continue
            valid = chosen >= num - value.shape[-1]
            if not valid.any():
                continue
            prototype_value = value @ get_affinity(similarity[:, num - value.shape[-1] :, valid])
            if g < len(long.value):
                long.value[g] = torch.cat([long.value[g], prototype_value], -1)
            else:
                long.value.append(prototype_value)
        prototype_shrinkage = shrinkage @ get_affinity(similarity)
        prototype_key = key[..., chosen]
        working.sieve_by_range(start, end, min_size + frame)
        long.add_keys(prototype_key, prototype_shrinkage, None)
