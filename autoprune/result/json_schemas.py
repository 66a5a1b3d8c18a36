"""JSON schemas of results and recipes: ``python -m autoprune.result.json_schemas docs/schemas`` writes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from autoprune.files.access import write_json
from autoprune.files.json_schema import DIALECT, schema_of, schema_of_file
from autoprune.result.form import RESULT_FORM
from autoprune.result.recipe import FORMAT as MODEL
from autoprune.result.recipe import RECIPE_FORM
from autoprune.result.saving import FORMAT as RESULT


def json_schemas() -> dict[str, dict[str, Any]]:
    """Make the schemas by the names of their files: of ``result.json``, and of the recipe in a file of weights.

    The recipe is the text ``recipe`` in the header of a safetensors file, whose entries ``format`` and ``version`` name
    the version.
    """
    recipe = {
        "$schema": DIALECT,
        "title": f"recipe of {MODEL.name} {MODEL.version}",
        "description": "What was cut from the dense model: indices kept of each tensor and dimension, sizes in Python.",
        **schema_of(RECIPE_FORM),
    }
    return {
        f"result-{RESULT.version}.schema.json": schema_of_file(RESULT, RESULT_FORM),
        f"recipe-{MODEL.version}.schema.json": recipe,
    }


def main(folder: str) -> None:
    """Write the schemas to a folder."""
    for name, schema in json_schemas().items():
        write_json(Path(folder) / name, schema, indent=2)


if __name__ == "__main__":
    main(sys.argv[1])
