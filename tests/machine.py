"""A machine of known speed: what operations take is decided by their sizes, with steps, on a clock that may drift."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LAUNCH = 2e-6
PER_MAC = 1e-9
PER_ELEMENT = 2e-9
STEP = 8
"""Channels are computed in eights: 9 take as long as 16."""


class Machine:
    """A `Clock` that runs a call once and adds up what its operations would take.

    Args:
        drift: How much slower the machine gets with each call, as a fraction.
        noise: Standard deviation of a block's time, as a fraction.
        cold: What operations take more inside a network than alone.
        per_pass: Seconds that a whole network takes besides its operations.
    """

    def __init__(self, drift: float = 0.0, noise: float = 0.0, cold: float = 1.0, per_pass: float = 0.0):
        self.drift, self.noise, self.cold, self.per_pass = drift, noise, cold, per_pass
        self.calls = 0
        self._rng = np.random.default_rng(0)

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        self.calls += 1
        with torch.inference_mode(), _Meter() as meter:
            call()
        seconds = meter.seconds
        if meter.operations > 1:
            seconds = seconds * self.cold + self.per_pass
        disturbed = 1 + self.noise * abs(self._rng.standard_normal())
        return repeats * seconds * disturbed * (1 + self.drift) ** self.calls


class _Meter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seconds, self.operations = 0.0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        if name in ("view", "t", "detach", "_unsafe_view", "expand", "as_strided") or not tensors:
            return out
        self.operations += 1
        self.seconds += LAUNCH + PER_ELEMENT * tensors[0].numel()
        if name in ("convolution", "conv2d"):  # in inference mode, layers are not decomposed
            weight, places = args[1], tensors[0].numel() // tensors[0].shape[1]
            self.seconds += PER_MAC * places * stepped(weight.shape[0]) * math.prod(weight.shape[1:])
        elif name in ("mm", "addmm", "linear"):
            a = next(leaf for leaf in args if isinstance(leaf, Tensor) and leaf.ndim == 2)
            self.seconds += PER_MAC * a.shape[1] * tensors[0].numel()
        return out


def stepped(channels: int) -> int:
    """Channels that the machine computes for this many."""
    return -(-channels // STEP) * STEP
