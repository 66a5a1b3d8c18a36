"""Leftovers that a search must not have in its process, and effects of searches in several threads on each other."""

import os
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune.evaluators import FineTune
from tests.searching import quick, seen
from zoo import ZOO

FIRST_SEARCH = """
import os, sys, warnings
import torch, autoprune
from torch import nn

def state():
    children = [pid for pid in os.listdir("/proc") if pid.isdigit() and parent(pid) == os.getpid()]
    return list(warnings.filters), dict(os.environ), sorted(os.listdir("/proc/self/fd")), children

def parent(pid):
    try:
        return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
    except OSError:
        return None

model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
options = {"trials": 3, "example": torch.zeros(2, 8), **eval(sys.argv[1])}
before = state()
autoprune.search(model, "flops <= 60%", **options)
for name, old, new in zip(("warning filters", "environment", "open files", "processes"), before, state(), strict=True):
    assert old == new, (name, [each for each in new if each not in old])
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files and processes are found in /proc")
@pytest.mark.parametrize(
    "options",
    ["{}", "{'example': autoprune.Call(inputs=torch.zeros(2, 8), checks='isolated')}", "{'optimizer': 'bayes'}"],
)
def test_the_first_search_of_a_process_leaves_it_as_it_was(options):
    call = [sys.executable, "-c", FIRST_SEARCH, options]
    finished = subprocess.run(call, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]


def train(model, steps):
    """Moves the weights by what it draws."""
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter) + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002
            time.sleep(0.001)


MODELS = ZOO["mlp"].build(), nn.TransformerEncoderLayer(64, 4, 32, batch_first=True).eval()
SEARCHES = {
    "re-fitting": lambda vectors: quick(MODELS[0], "flops <= 60%", vectors, trials=8),
    "trained by a recipe that draws": lambda vectors: quick(
        MODELS[0],
        "flops <= 60%",
        vectors,
        trials=4,
        optimizer="random",
        evaluator=FineTune(steps=2, train_fn=train),
    ),
    "fine-tuning": lambda vectors: quick(
        MODELS[0], "flops <= 50%", vectors, trials=4, optimizer="nsga2", seed=5, evaluator=FineTune(steps=4)
    ),
    "attention": lambda vectors: quick(
        MODELS[1],
        "flops <= 80%",
        None,
        trials=3,
        optimizer="random",
        example=torch.zeros(2, 3, 64),
    ),
}


@pytest.mark.slow
def test_searches_in_several_threads_give_what_each_gives_alone(vectors, global_rng_untouched):
    alone = {name: seen(search(vectors)) for name, search in SEARCHES.items()}
    found, failures = {}, []
    written, fused = nn.Module.__setattr__, torch.backends.mha.get_fastpath_enabled()

    def run(name):
        try:
            for _ in range(2):
                result = seen(SEARCHES[name](vectors))
                found.setdefault(name, result)
                assert found[name] == result
        except BaseException as error:  # shown below
            failures.append((name, error))

    with global_rng_untouched():
        threads = [threading.Thread(target=run, args=(name,)) for name in SEARCHES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert found == alone
    assert nn.Module.__setattr__ is written
    assert torch.backends.mha.get_fastpath_enabled() == fused


class TestIsolatedChecks:
    @pytest.mark.slow
    def test_take_models_and_functions_that_only_this_process_knows(self):
        def forward(model, batch):
            return model(batch[0])

        class Local(nn.Sequential):
            pass

        model = Local(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        data = torch.zeros(100, 8), torch.zeros(100).long()
        result = quick(
            model,
            "flops <= 60%",
            data,
            forward=forward,
            trials=2,
            checks="isolated",
        )
        assert len(result.trials) == 2

    @pytest.mark.slow
    def test_a_model_that_prints_does_not_disturb_them(self, capfd):
        class Talks(nn.Sequential):
            def forward(self, x):
                sys.stdout.write("a pass\n")
                return super().forward(x)

        model = Talks(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        result = quick(model, "flops <= 60%", None, example=torch.zeros(2, 8), trials=2, checks="isolated")
        assert len(result.trials) == 2

    @pytest.mark.slow
    def test_what_the_model_raises_there_is_raised_here(self):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        with torch.no_grad():
            model[0].weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="model must return finite outputs"):
            autoprune.search(model, "flops <= 60%", example=autoprune.Call(inputs=torch.ones(2, 8), checks="isolated"))
