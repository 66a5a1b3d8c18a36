"""Programs of ``torch.export`` as files: compared after they were saved and loaded again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

from autoprune.errors import UnsupportedModelError
from autoprune.files.access import brief
from autoprune.result.exporting.parity import Parity, compare
from autoprune.result.exporting.program import Program, described, quiet

METADATA = "autoprune.json"
"""Name under which ``torch.export.load(path, extra_files={"autoprune.json": ""})`` finds the metadata."""


def write_program(program: Program, fresh: Path, tolerance: float | None) -> Parity:
    """Write a program that gives the module's outputs after it is loaded again.

    Raises:
        UnsupportedModelError: If it cannot be saved or loaded, or its outputs differ.
    """
    name = program.calls[0].name
    try:
        saved = _saved(program, {})
        with quiet():
            loaded = torch.export.load(io.BytesIO(saved)).module()  # which we wrote; it may unpickle
        found = [call.outputs_of(loaded) for call in program.calls]
    except Exception as error:  # of the serialiser, or of the operations when they run
        raise UnsupportedModelError(
            f"{name} cannot be saved as a program of torch.export: {brief(error)}; the other formats may still work"
        ) from error
    parity = compare(program.expected, found, f"{name} as a program of torch.export", tolerance)
    fresh.write_bytes(_saved(program, {METADATA: json.dumps(described(program, parity.to_json()))}))
    return parity


def _saved(program: Program, extra_files: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    with quiet():
        torch.export.save(program.exported, file, extra_files=extra_files)
    return file.getvalue()
