"""DPC-KNN merging written out point by point, for one frame: slow, and close to how the method is described."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cluster_frame(tokens: Tensor, num_clusters: int, num_neighbors: int) -> list[int]:
    """Cluster index of each of the N tokens (N, C), by loops over points."""
    if num_neighbors > num_clusters:
        num_neighbors = min(3, max(num_clusters // 2, 1))
    num_tokens, num_channels = tokens.shape
    points = range(num_tokens)
    dist = [((tokens - tokens[i]).pow(2).sum(dim=1).sqrt() / math.sqrt(num_channels)).tolist() for i in points]
    largest = max(map(max, dist))

    density = [math.exp(-sum(d * d for d in sorted(dist[i])[:num_neighbors]) / num_neighbors) for i in points]
    score = []
    for i in points:
        delta = min((dist[i][j] for j in points if density[j] > density[i]), default=largest)
        score.append(delta * density[i])
    centers = sorted(points, key=lambda i: -score[i])[:num_clusters]  # `sorted` is stable

    clusters = []
    for i in points:
        if i in centers:
            clusters.append(centers.index(i))
        else:
            to_centers = [dist[center][i] for center in centers]
            clusters.append(to_centers.index(min(to_centers)))
    return clusters


def merge_frame(features: Tensor, cluster_counts: Sequence[int], neighbors: Sequence[int]) -> Tensor:
    """Visual tokens of one frame: (N, C) -> (sum of counts, C), differentiable."""
    merged = []
    tokens = features
    for num_clusters, num_neighbors in zip(cluster_counts, neighbors, strict=True):
        clusters = cluster_frame(tokens.detach(), num_clusters, num_neighbors)
        averages = []
        for cluster in range(num_clusters):
            members = [tokens[i] for i, own in enumerate(clusters) if own == cluster]
            averages.append(torch.stack(members).sum(dim=0) / (len(members) + 1e-6))
        tokens = torch.stack(averages)
        merged.append(tokens)
    return torch.cat(merged)
