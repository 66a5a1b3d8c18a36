"""Data inside a web page: JSON that cannot end its script, and compressed blocks that the browser unpacks."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping
from typing import Any

_LEVEL = 6
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def as_script(content: Any) -> str:
    r"""Format JSON for the inside of a script element, where no text of it can end the element.

    Numbers that are not finite become null.

    Example:
        >>> as_script({"name": "</script>", "value": float("nan")})
        '{"name":"\\u003c/script\\u003e","value":null}'
    """
    return as_json(content).translate(_ESCAPES)


def as_json(content: Any) -> str:
    """Format as compact JSON in ASCII, with null for numbers that are not finite."""
    return json.dumps(finite(content), separators=(",", ":"), allow_nan=False)


def finite(tree: Any) -> Any:
    """Replace numbers that are not finite by None, and tuples by lists."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {str(key): finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return tree


def packed(content: bytes) -> str:
    """Compress bytes with gzip, as base64: the same text for the same bytes."""
    return base64.b64encode(gzip.compress(content, _LEVEL, mtime=0)).decode("ascii")


def unpacked(text: str) -> bytes:
    """Restore what `packed` made."""
    return gzip.decompress(base64.b64decode(text))


def rounded(value: float | None, digits: int = 6) -> float | None:
    """Round to significant digits, which a page shows at most; None stays, and what is not finite becomes None."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")
