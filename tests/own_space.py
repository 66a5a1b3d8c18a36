"""A space that a third party wrote without any class of autoprune but the protocol's."""

from dataclasses import dataclass

import numpy as np

import autoprune
from autoprune.protocols import Dimension


@dataclass(frozen=True)
class UniformSpace:
    """The same share of units in every group; `order` holds the units by falling importance."""

    shares: tuple[float, ...]
    order: dict[str, list[int]]

    @property
    def dimensions(self):
        return (Dimension("width", self.shares),)

    @property
    def sizes(self):
        return np.array([len(self.shares)])

    def canonical(self, candidates):
        return candidates  # no dimension makes another irrelevant

    def decode(self, candidate):
        return {"width": self.shares[candidate[0]]}

    def pruning(self, candidate):
        share = self.shares[candidate[0]]
        kept = {name: tuple(sorted(units[: round(share * len(units))])) for name, units in self.order.items()}
        return autoprune.Pruning({} if share == 1 else kept)

    def widths(self, candidates):
        return np.array([[round(self.shares[i] * len(u)) for u in self.order.values()] for (i,) in candidates], float)

    def zeroed(self, candidates):
        return np.zeros(len(candidates))

    def describe(self):
        return f"{len(self.shares)} widths common to {len(self.order)} groups"

    def to_json(self):
        return {"type": "own", "shares": list(self.shares), "order": self.order}

    @classmethod
    def from_json(cls, data):
        return cls(tuple(data["shares"]), data["order"])


@dataclass(frozen=True)
class OwnUniform:
    """Settings: what `space=` takes before the model is known."""

    shares: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    criterion: str = "l2"

    def bind(self, structure, order):
        return UniformSpace(
            self.shares, {group.name: [int(u) for u in order[group.name]] for group in structure.groups}
        )


def register():
    autoprune.register_space("own", OwnUniform, UniformSpace)
