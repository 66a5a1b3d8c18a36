"""The context that most tests of a supernet train in."""

import pytest

from tests.supernet.networks import context_of


@pytest.fixture(scope="module")
def context():
    return context_of()
