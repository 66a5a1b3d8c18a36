"""The benchmark of zeros in a language model, on a tiny one: every method keeps its number of weights."""

import numpy as np
import pytest
import torch

from benchmarks.peers.language.case import Case
from benchmarks.peers.language.zeros import METHODS, SEARCHES, Zeros
from benchmarks.peers.sparsity_language import report

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Zeros:
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        ids = torch.randint(0, 101, (64, 12))
    case = Case(model, ids, seed=0, evaluations=6, dtype=torch.float32)
    return Zeros.of_case(case, tmp_path_factory.mktemp("zeros"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_number_of_weights(zeros: Zeros, method: str):
    total = sum(weight.numel() for weight in zeros.weights.values())
    assert len(zeros.weights) == 21
    network = METHODS[method](zeros, 0.6)
    left = sum(int((network.get_parameter(name) != 0).sum()) for name in zeros.weights)
    assert 0.37 * total < left <= 0.4 * total + 21
    if method not in SEARCHES:
        network = METHODS[method](zeros, "2:4")
        assert sum(int((network.get_parameter(name) != 0).sum()) for name in zeros.weights) == total // 2


@pytest.mark.slow
def test_owl_gives_one_density_to_a_block(zeros: Zeros):
    network = METHODS["OWL + SparseGPT"](zeros, 0.6)
    for block in range(3):
        own = [name for name in zeros.weights if f".{block}." in name]
        densities = [float((network.get_parameter(name) != 0).double().mean()) for name in own]
        np.testing.assert_allclose(densities, np.mean(densities), atol=2e-2)


def test_a_report_is_written_of_what_is_there():
    found = {
        "dense": {"news": 3.0, "wikipedia": 4.0},
        "cells": {"uniform Wanda | 0.7 | 0": {"news": 3.5, "wikipedia": 5.0, "cpu_seconds": 1.0}},
    }
    text = report(found)
    assert "70% zeros" in text
    assert "| uniform Wanda | 0.500 / 1.000 |" in text
