"""Token merging: the patch features of a frame -> a few visual tokens, without parameters.

Density-peak clustering with k-nearest neighbours (DPC-KNN) in rounds, as Chat-UniVi uses it
(https://huggingface.co/papers/2311.08046, section 3.2). Ours is deterministic: the original breaks ties between
densities with random noise. Frames are clustered side by side and never look at each other.
This module neither runs the visual tower nor projects the tokens.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Added to the number of members that a sum is divided by, as in Chat-UniVi.
_COUNT_EPS = 1e-6
# Rows of the distance matrix that are computed together.
_STRIP = 64


def merge_visual_tokens(features: Tensor, cluster_counts: Sequence[int], neighbors: Sequence[int]) -> Tensor:
    """Merge the patch features of each frame into clusters, round after round.

    Round r clusters the tokens that round r - 1 left; the tokens of all rounds are returned, the first round's first.
    Inside a round they are ordered by how good a centre they have: densest and most isolated first.
    A frame's tokens are the same alone and in a batch. Which tokens belong together is decided in float32 and without
    gradients, also under autocast; gradients reach `features` through the averages.

    Args:
        features (`torch.Tensor` of shape `(F, N, C)`, floating point): N patch features of F frames.
        cluster_counts (sequence of `int`): clusters of each round, none larger than the one before nor than N.
        neighbors (sequence of `int`): nearest neighbours that density is measured with, for each round.

    Returns:
        `torch.Tensor` of shape `(F, sum(cluster_counts), C)` and of the dtype of `features`.
    """
    merged = []
    # Autocast would round the inner products of `_squared_distances` to half precision.
    with torch.autocast(features.device.type, enabled=False):
        tokens = features.float()
        for num_clusters, num_neighbors in zip(cluster_counts, neighbors, strict=True):
            clusters = assign_clusters(tokens.detach(), num_clusters, num_neighbors)
            tokens = average_clusters(tokens, clusters, num_clusters)
            merged.append(tokens)
    return torch.cat(merged, dim=1).to(features.dtype)


@torch.no_grad()
def assign_clusters(tokens: Tensor, num_clusters: int, num_neighbors: int) -> Tensor:
    """Assign each token to one of K clusters with DPC-KNN.

    Ties are broken by position: of equally good centres, and of equally near centres, the first one counts.

    Args:
        tokens (`torch.Tensor` of shape `(F, N, C)`, float32): tokens of F frames.
        num_clusters (`int`): K, at most N.
        num_neighbors (`int`): nearest neighbours in the density, the token itself included. More than K of them
            become `min(3, max(K // 2, 1))`, as in Chat-UniVi.

    Returns:
        `torch.Tensor` of shape `(F, N)`, int64 in [0, K): the cluster of each token, 0 having the best centre.
    """
    if num_neighbors > num_clusters:
        num_neighbors = min(3, max(num_clusters // 2, 1))
    num_tokens, num_channels = tokens.shape[1:]
    squared = _squared_distances(tokens)  # (F, N, N)
    largest = squared.amax(dim=(1, 2), keepdim=True)

    # The nearest neighbour is the token itself, at distance 0: with its diagonal away, one less has to be looked for.
    diagonal = squared.diagonal(dim1=1, dim2=2)
    diagonal.fill_(math.inf)
    others = squared.topk(num_neighbors - 1, dim=-1, largest=False).values  # ascending
    diagonal.fill_(0)
    # Distances are meant divided by sqrt(C): only here does it count. It would not change which of two is the larger.
    density = (others.sum(dim=-1) / (-num_neighbors * num_channels)).exp()  # (F, N)

    # delta: the distance to the nearest token of higher density; where there is none, the largest of the frame.
    is_denser = density[:, None, :] > density[:, :, None]  # (F, N, N): is j denser than i?
    delta = torch.where(is_denser, squared, largest).amin(dim=-1).sqrt()  # (F, N)
    ranking = torch.sort(delta * density, dim=-1, descending=True, stable=True).indices
    centers = ranking[:, :num_clusters]  # (F, K)

    clusters = squared.gather(2, centers[:, None].expand(-1, num_tokens, -1)).argmin(dim=2)  # (F, N, K) -> (F, N)
    # Of two centres in the same place, the second would otherwise join the first and leave its cluster empty.
    own = torch.arange(num_clusters, device=tokens.device).expand_as(centers)
    return clusters.scatter(1, centers, own)


def average_clusters(tokens: Tensor, clusters: Tensor, num_clusters: int) -> Tensor:
    """Average the members of each cluster: their sum / (their number + 1e-6).

    Args:
        tokens (`torch.Tensor` of shape `(F, N, C)`): tokens of F frames.
        clusters (`torch.Tensor` of shape `(F, N)`, int64 in [0, K)): the cluster of each token.
        num_clusters (`int`): K.

    Returns:
        `torch.Tensor` of shape `(F, K, C)`.
    """
    num_frames, _, num_channels = tokens.shape
    num_bags = num_frames * num_clusters
    first_bag = torch.arange(num_frames, device=tokens.device)[:, None] * num_clusters
    bags, members = torch.sort((clusters + first_bag).flatten(), stable=True)
    starts = torch.searchsorted(bags, torch.arange(num_bags + 1, device=tokens.device))
    # Sums of bags run in the order of the members, so they are deterministic on a GPU too; `index_add` is not there.
    sums = F.embedding_bag(members, tokens.reshape(-1, num_channels), starts[:-1], mode="sum")
    counts = starts.diff()[:, None]  # (F * K, 1)
    return sums.div_(counts + _COUNT_EPS).view(num_frames, num_clusters, num_channels)


def _squared_distances(tokens: Tensor) -> Tensor:
    """Squared Euclidean distances of each frame's tokens: (F, N, C) -> (F, N, N)."""
    # |a - b|^2 = |a|^2 + |b|^2 - 2ab, as `torch.cdist` computes it above 25 tokens. The norms are taken from the
    # diagonal of the products, so that the distance of a token to itself is exactly 0.
    products = _inner_products(tokens)
    norms = products.diagonal(dim1=1, dim2=2).clone()
    # In place: matrices of this size, made anew, cost more in page faults than in arithmetic.
    torch.sub(norms[:, None, :], products, alpha=2, out=products)
    return products.add_(norms[:, :, None]).clamp_(min=0)


def _inner_products(tokens: Tensor) -> Tensor:
    """Inner products of each frame's tokens with each other: (F, N, C) -> (F, N, N)."""
    # `tokens @ tokens.mT` is symmetric: above the diagonal it is computed in strips of rows, below it is copied.
    num_tokens = tokens.shape[1]
    products = tokens.new_empty(tokens.shape[0], num_tokens, num_tokens)
    for start in range(0, num_tokens, _STRIP):
        end = min(start + _STRIP, num_tokens)
        strip = tokens[:, start:end] @ tokens[:, start:].mT  # (F, end - start, N - start)
        products[:, start:end, start:] = strip
        products[:, end:, start:end] = strip[:, :, end - start :].mT
    return products
