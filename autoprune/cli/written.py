"""Models that commands write, and the command that comes next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune.files.access import as_path

if TYPE_CHECKING:
    from torch import nn

OWN = "safetensors"
"""Format of `autoprune.save`."""


def require_writable(output: Path, folder: bool = False) -> None:
    """Check where a model is to be written before anything takes time.

    Raises:
        IsADirectoryError: If it is a folder, unless one is wanted.
        FileNotFoundError: If it lies in a folder that does not exist.
    """
    if as_path(output, "output").is_dir() and not folder:
        raise IsADirectoryError(f"output must be a file to write, got the folder {output}")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"output must lie in a folder that exists, got {output}")


def write_model(small: nn.Module, output: Path, format: str, example: Any) -> str:  # noqa: A002
    """Write a pruned model, and say what was written and how to read it."""
    from autoprune.result.exporting.export import export
    from autoprune.result.recipe import save

    if format == OWN:
        save(small, output)
        return f"saved as {output}; in Python: autoprune.load({str(output)!r}, fresh_model)"
    read = {
        "onnx": "onnxruntime.InferenceSession({!r})",
        "torch": "torch.export.load({!r}).module()",
        "hf": "autoprune.from_pretrained({!r})",
    }
    return f"{export(small, output, example, format=format)}\nin Python: {read[format].format(str(output))}"


def next_command(name: str, source: str, model: str, *options: str, output: str) -> str:
    """Name the command that comes next, ready to be pasted."""
    return f"next: {shlex.join(['autoprune', name, source, '--model', model, *options, '--output', output])}"
