"""Draws and comparisons that several contracts use."""

from __future__ import annotations

import random

import numpy as np
import torch

from autoprune.protocols import IntArray, SearchSpace


def draw(space: SearchSpace) -> IntArray:
    """Random candidates of a space, shape (20, d); the same at every call."""
    return np.random.default_rng(0).integers(0, space.sizes, size=(20, len(space.sizes)))


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The values of a tensor as bytes, which also compare NaN."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16


def random_states() -> tuple[str, str, bytes]:
    """The global random states of Python, NumPy and PyTorch."""
    return repr(random.getstate()), repr(np.random.get_state()), torch.get_rng_state().numpy().tobytes()  # noqa: NPY002
