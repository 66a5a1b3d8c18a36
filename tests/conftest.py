"""Common fixtures: one thread, data that need no download, and a trained network."""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune import Data
from tests.processes import MARK, running
from zoo import ZOO, resnet

torch.set_num_threads(1)  # the same sums in the same order on every machine, and no fight over small tensors


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-case", action="store_true", help="run the first case of each parametrised test alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out further cases where asked to, and skip tests marked ``gpu`` where there is no GPU."""
    if config.getoption("--one-case"):
        first = {item.nodeid.partition("[")[0]: item.nodeid for item in reversed(items)}
        kept = set(first.values())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = [item for item in items if item.nodeid in kept]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch.cuda.is_available() is false"))


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """Fail if a process that any test started is still there at the end: workers, Ray's daemons, subprocesses.

    They are known by a variable that children inherit, because daemons and orphans do not stay children.
    """
    os.environ.update([MARK.split("=")])
    yield
    deadline = time.monotonic() + 30
    while running() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not running(), f"left running after the tests: {running()}"


@dataclass(frozen=True)
class Digits:
    """Handwritten digits; each split is images (n, 1, 8, 8), float32 in [0, 1], and labels (n,), int64."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@pytest.fixture(scope="session")
def digits() -> Digits:
    """1,000 digits to train on, 400 to validate and 397 to test, in an order fixed by a seed."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    images = torch.tensor(raw.images[order] / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(raw.target[order], dtype=torch.int64)
    splits = zip(images.split([1000, 400, 397]), labels.split([1000, 400, 397]), strict=True)
    return Digits(*splits)


@pytest.fixture(scope="session")
def digits_model(digits: Digits) -> nn.Module:
    """A residual network of 8 layers trained on `digits`, in eval mode. Shared: copy it before changing it."""
    images, labels = digits.train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet(8, width=8, channels=1)
        steps = 8 * len(images) // 50
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
        for _ in range(8):
            for batch in torch.randperm(len(images)).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
                schedule.step()
    model.zero_grad()
    return model.eval()


@pytest.fixture(scope="session")
def data(digits: Digits) -> Data:
    """The digits, as a search takes them."""
    return Data(calibration=digits.train, validation=digits.validation, test=digits.test)


@pytest.fixture(scope="module")
def vectors() -> tuple[Tensor, Tensor]:
    """Features (240, 64) with labels that the first ten of them tell."""
    x = torch.randn(240, 64, generator=torch.Generator().manual_seed(0))
    return x, x[:, :10].argmax(1)


@pytest.fixture
def mlp() -> nn.Module:
    """A network of linear layers for `vectors`."""
    return ZOO["mlp"].build()


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One Ray of two workers for all tests of a module."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture
def global_rng_untouched() -> Callable[[], AbstractContextManager[None]]:
    """A context manager that fails if its body moved the global random state of torch, NumPy or Python."""
    return _global_rng_untouched


@contextmanager
def _global_rng_untouched() -> Iterator[None]:
    def states() -> tuple[bytes, str, object]:
        return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state(legacy=False)), random.getstate()  # noqa: NPY002

    before = states()
    yield
    for name, old, new in zip(("torch", "NumPy", "Python"), before, states(), strict=True):
        assert old == new, f"the global random state of {name} changed"
