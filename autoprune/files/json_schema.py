"""JSON schemas of the files that autoprune writes, made from the forms that it checks when it reads them."""

from __future__ import annotations

from typing import Any

from autoprune.files.formats import Format
from autoprune.files.schema import Form

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_PLAIN: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    None: {"type": "null"},
    object: {},
}


def schema_of(form: Form) -> dict[str, Any]:
    """Make the JSON schema, in the dialect of 2020-12, of a form as `autoprune.files.schema` defines it.

    Objects may have further keys, as later versions of the same format add some.

    Example:
        >>> schema_of([(int, None)])
        {'type': 'array', 'items': {'anyOf': [{'type': 'integer'}, {'type': 'null'}]}}
    """
    if isinstance(form, list):
        return {"type": "array", "items": schema_of(form[0])}
    if isinstance(form, tuple):
        return {"anyOf": [schema_of(each) for each in form]}
    if isinstance(form, frozenset):
        return {"enum": sorted(form)}
    if not isinstance(form, dict):
        return dict(_PLAIN[form])
    if str in form:
        return {"type": "object", "additionalProperties": schema_of(form[str])}
    return {
        "type": "object",
        "properties": {key.removesuffix("?"): schema_of(each) for key, each in form.items()},
        "required": [key for key in form if not key.endswith("?")],
    }


def schema_of_file(format_: Format, form: Form) -> dict[str, Any]:
    """Make the JSON schema of a file: its form, with the name and the version of the format."""
    schema = schema_of(form)
    stamp = {name: {"const": value} for name, value in format_.stamp().items()}
    return {
        "$schema": DIALECT,
        "title": f"{format_.name} {format_.version}",
        "description": f"{format_.holds[0].upper()}{format_.holds[1:]} of autoprune.",
        **schema,
        "properties": {**stamp, **schema["properties"]},
        "required": [*stamp, *schema["required"]],
    }
