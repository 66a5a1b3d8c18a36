"""Searches with a journal that are stopped, and go on."""

import torch

import autoprune
from autoprune.evaluators import AdaptiveBN
from autoprune.journal.journal import Journal
from tests.searching import grouped
from zoo import ZOO

TRIALS = 30


def make_data(seed=0):
    x = torch.randn(240, 64, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :10].argmax(1)


def search(run_dir, resume=False, budget="flops <= 50%", model=None, data=None, trials=TRIALS, **options):
    model, data = model or ZOO["mlp"].build(), data or make_data()
    options = {"optimizer": "level_switch", "evaluator": "adaptive_bn", "run_dir": run_dir, "resume": resume, **options}
    return autoprune.search(model, budget, data, trials=trials, **grouped(**options))


def seen(result):
    """Parts of a result that two searches must agree on, to the last digit."""
    trials = [(t.id, t.candidate, t.status, t.score, t.signal, t.distortion, str(t.interval)) for t in result.trials]
    return trials, [(t.id, t.test_score) for t in result.front], result.stopped


class Counting(AdaptiveBN):
    """Counts what it evaluates, and raises `stop` instead of evaluating more than `most`."""

    def __init__(self, most=10**9, stop=KeyboardInterrupt):
        super().__init__()
        self.most, self.stop, self.count = most, stop, -1  # the first is the dense model

    def evaluate(self, candidates, chunk=None):
        if self.count == self.most:
            raise self.stop
        self.count += len(candidates)
        return super().evaluate(candidates, chunk)


def interrupted(run_dir, after, **options):
    """A search that stopped after `after` trials."""
    return search(run_dir, evaluator=Counting(after), **options)


def rows(run_dir):
    with Journal.open(run_dir) as journal:
        return journal.trials()
