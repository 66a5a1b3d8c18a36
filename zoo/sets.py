"""Networks over sets: categories of a click to recommend by, and points in space."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layers(*sizes: int) -> nn.Sequential:
    """Linear layers with a ReLU after each but the last."""
    linear = [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise(sizes[:-1])]
    return nn.Sequential(*linear, nn.Linear(*sizes[-2:]))


class Dlrm(nn.Module):
    """Numbers (b, 13) and bags of categories (b, fields, n), joined by all dot products (Naumov et al., 2019)."""

    def __init__(self, fields: int = 4, categories: int = 30, width: int = 12):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(categories, width, mode="sum") for _ in range(fields))
        self.bottom = layers(13, 32, 24, width)
        pairs = (fields + 1) * fields // 2
        self.top = layers(width + pairs, 40, 24, 1)
        self.register_buffer("pairs", torch.tril_indices(fields + 1, fields + 1, -1))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        vectors = torch.stack([dense, *(bag(categories[:, i]) for i, bag in enumerate(self.bags))], dim=1)
        dots = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat((dense, dots), dim=1)).squeeze(1)


class DeepFm(nn.Module):
    """A factorisation machine and a deep network over the same embeddings of (b, fields) (Guo et al., 2017)."""

    def __init__(self, fields: int = 6, categories: int = 40, width: int = 8):
        super().__init__()
        self.linear, self.embed = nn.Embedding(categories, 1), nn.Embedding(categories, width)
        self.deep = nn.Sequential(
            *(nn.Linear(fields * width, 40), nn.BatchNorm1d(40), nn.ReLU()),
            *(nn.Linear(40, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 1)),
        )

    def forward(self, categories: Tensor) -> Tensor:
        vectors = self.embed(categories)
        pairs = (vectors.sum(1).square() - vectors.square().sum(1)).sum(1) / 2
        return self.linear(categories).sum((1, 2)) + pairs + self.deep(vectors.flatten(1)).squeeze(1)


class TwoTower(nn.Module):
    """A user (id and traits) and an item (id) meet in the cosine of two towers (after Yi et al., 2019)."""

    def __init__(self, users: int = 40, items: int = 30, width: int = 16, traits: int = 6):
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user, self.item = layers(width + traits, 40, 32, 20), layers(width, 36, 20)
        self.temperature = nn.Parameter(torch.tensor(5.0))

    def forward(self, user: Tensor, traits: Tensor, item: Tensor) -> Tensor:
        left = self.user(torch.cat((self.users(user), traits), dim=1))
        right = self.item(self.items(item))
        return self.temperature * (F.normalize(left, dim=1) * F.normalize(right, dim=1)).sum(1)


def point_layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(inputs, outputs, 1), nn.BatchNorm1d(outputs), nn.ReLU())


class TNet(nn.Module):
    """A matrix for the whole cloud, the identity plus what a small PointNet says: (b, k, n) to (b, k, k)."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k
        self.points = nn.Sequential(point_layer(k, 16), point_layer(16, 32))
        self.matrix = layers(32, 24, k * k)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix(self.points(x).max(dim=2).values).view(-1, self.k, self.k)
        return matrix + torch.eye(self.k, device=x.device)


class PointNet(nn.Module):
    """Points (b, 3, n), turned by one T-Net, their features by another, pooled by maximum (Qi et al., 2017)."""

    def __init__(self, classes: int = 8):
        super().__init__()
        self.turn, self.turn_features = TNet(3), TNet(12)
        self.early = point_layer(3, 12)
        self.late = nn.Sequential(point_layer(12, 32), point_layer(32, 64))
        self.head = layers(64, 40, 24, classes)

    def forward(self, points: Tensor) -> Tensor:
        points = torch.bmm(points.transpose(1, 2), self.turn(points)).transpose(1, 2)
        features = self.early(points)
        features = torch.bmm(features.transpose(1, 2), self.turn_features(features)).transpose(1, 2)
        return self.head(self.late(features).amax(dim=2))
