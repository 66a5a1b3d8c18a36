"""Damaged files of every kind: read if nothing that matters is damaged, and refused in a sentence otherwise."""

import logging

import numpy as np
import pytest

from tests.damaging import KINDS, counted, flips, make_all, truncations

FLIPS, EDITS = 20, 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_all(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("damage", ["truncated", "bits flipped", "values edited"])
def test_a_damaged_file_is_read_or_refused_in_a_sentence_that_names_it(folder, name, damage, caplog):
    kind, rng = KINDS[name], np.random.default_rng(0)
    content = (folder / name / kind.name).read_bytes()
    inputs, most = {
        "truncated": (truncations(content), 20),
        "bits flipped": (flips(content, rng), FLIPS),
        "values edited": (kind.edits(folder / name, rng), EDITS),
    }[damage]
    with caplog.at_level(logging.CRITICAL):
        counts, wrong, _ = counted(kind, folder / name, inputs, most)
    assert wrong == []
    assert counts["read"] + counts["refused"] == most
    if name != "log":  # whose damaged lines are done again
        assert counts["refused"] > 0
