"""Numbers of dimensions, options and candidates in words."""

from __future__ import annotations

import math

from autoprune.protocols import IntArray

_MOST = 10**6
"""Most candidates that are given as a number; beyond, as a power of ten."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> counted(1, "group"), counted(2, "group")
        ('1 group', '2 groups')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def options_of(sizes: IntArray, noun: str) -> str:
    """Return the smallest and the largest number of options of a dimension, from their numbers, shape (d,).

    Example:
        >>> import numpy as np
        >>> options_of(np.array([2, 2]), "width"), options_of(np.array([2, 8]), "width")
        ('2 widths each', '2 to 8 widths')
    """
    least, most = int(sizes.min()), int(sizes.max())
    if len(sizes) == 1:
        return counted(most, noun)
    return f"{counted(most, noun)} each" if least == most else f"{least} to {counted(most, noun)}"


def candidates_of(sizes: IntArray) -> str:
    """Return the number of candidates of dimensions with these numbers of options, shape (d,).

    Example:
        >>> import numpy as np
        >>> candidates_of(np.array([2, 2])), candidates_of(np.array([10] * 20))
        ('4 candidates', '10^20 candidates')
    """
    number = math.prod(sizes.tolist())
    return counted(number, "candidate") if number <= _MOST else f"10^{math.log10(number):.0f} candidates"
