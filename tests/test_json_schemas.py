"""JSON schemas in the docs: those of the code, true of what is written, and false of what is refused."""

import json
from pathlib import Path

import jsonschema
import pytest
from safetensors import safe_open

import autoprune
from autoprune.files.schema import require_form
from autoprune.result.form import RESULT_FORM
from autoprune.result.json_schemas import json_schemas
from tests.resuming import search

SCHEMAS = Path(__file__).parent.parent / "docs" / "schemas"
RESULT, RECIPE = "result-1.schema.json", "recipe-1.schema.json"


def validator(name):
    schema = json.loads((SCHEMAS / name).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def result():
    return search(None, trials=6, optimizer="auto")


@pytest.mark.parametrize("name", [RESULT, RECIPE])
def test_the_docs_hold_the_schemas_of_this_version(name):
    """``python -m autoprune.result.json_schemas docs/schemas`` writes them again."""
    assert json.loads((SCHEMAS / name).read_text()) == json_schemas()[name]
    assert {path.name for path in SCHEMAS.iterdir()} == set(json_schemas())


def test_a_saved_result_is_valid(result, tmp_path):
    validator(RESULT).validate(json.loads((result.save(tmp_path / "saved") / "result.json").read_text()))


def test_the_recipe_in_a_file_of_weights_is_valid(result, tmp_path):
    autoprune.save(result.build(), tmp_path / "small.safetensors")
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    assert recipe["slices"]
    validator(RECIPE).validate(recipe)


DAMAGE = {
    "no trials": lambda data: data.pop("trials"),
    "a score of text": lambda data: data["trials"][0].update(score="high"),
    "an unknown status": lambda data: data["trials"][0].update(status="lost"),
    "a front of text": lambda data: data.update(front="0"),
    "options that are no integers": lambda data: data["trials"][0]["candidate"].append(0.5),
    "a seed of none": lambda data: data.update(seed=None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_schema_and_reader_refuse_the_same(damage, result):
    data = json.loads(json.dumps(result.to_json()))
    assert validator(RESULT).is_valid(data)
    require_form(data, RESULT_FORM)
    DAMAGE[damage](data)
    assert not validator(RESULT).is_valid(data)
    with pytest.raises(ValueError, match=r".+"):
        require_form(data, RESULT_FORM)


def test_another_version_is_not_valid(result):
    assert not validator(RESULT).is_valid({**json.loads(json.dumps(result.to_json())), "version": 2})
