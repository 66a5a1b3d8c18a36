"""Data that a supernet is trained on: their form, their rounds, and their targets."""

import pytest
import torch

import autoprune
from autoprune.data.sampling import training_loader
from autoprune.errors import DataError
from autoprune.evaluators.training.loader import Rounds
from tests.supernet.networks import (
    Augmented,
    Plain,
    assert_equal,
    context_of,
    prepared,
    rows,
    weights,
)


class Keyword(Plain):
    """Takes its input by name, and nothing else."""

    def forward(self, x):
        return super().forward(x)


@pytest.mark.slow
def test_the_key_of_the_target_holds_for_the_training_data_too():
    x, y = rows()
    batches = [{"x": x[i : i + 15], "kind": y[i : i + 15]} for i in range(0, 90, 15)]
    named = [{"x": batch["x"], "labels": batch["kind"]} for batch in batches]
    data = autoprune.Data(validation=batches, labels="kind")
    found = weights(prepared(context_of(Keyword, data), steps=3, data=batches))
    expected = weights(prepared(context_of(Keyword, autoprune.Data(validation=named)), steps=3, data=named))
    assert_equal(found, expected)
    with pytest.raises(DataError, match="labels='kind' must be a key of every batch"):
        prepared(context_of(Keyword, data), steps=3, data=named)


SOURCES = {
    "arrays": lambda: rows(),
    "numpy": lambda: tuple(array.numpy() for array in rows()),
    "dataset": Augmented,
    "loader": lambda: torch.utils.data.DataLoader(Augmented(), 16, shuffle=True, generator=torch.Generator()),
    "batches": lambda: [rows(16, seed) for seed in range(3)],
}


@pytest.mark.parametrize("name", SOURCES)
def test_rounds_go_on_from_any_position_with_the_same_batches(name):
    def rounds(position=(0, 0)):
        return Rounds(training_loader(SOURCES[name](), 16, "supernet"), 0, position)

    whole, seen = rounds(), []
    for _ in range(9):
        batch = next(whole)
        seen.append((whole.position, batch))
    for i in (0, 2, 4, 7):
        again = rounds(seen[i][0])
        for position, batch in seen[i + 1 :]:
            assert all(torch.equal(a, b) for a, b in zip(next(again), batch, strict=True))
            assert again.position == position
    if name != "batches":
        firsts = [batch[0] for (_, read), batch in seen if read == 1]
        assert len(firsts) > 1
        assert not torch.equal(*firsts[:2])


@pytest.mark.slow
def test_a_batch_of_one_sample_is_passed_over_where_batch_norm_cannot_take_it(context):
    batches = [rows(1), rows(8), rows(1)]
    prepared(context, steps=3, data=batches)
    with pytest.raises(DataError, match="at least 2 samples"):
        prepared(context, steps=3, data=[rows(1)])
    prepared(context_of(Plain), steps=3, data=[rows(1)])


@pytest.mark.parametrize(
    ("data", "message"), [((b for b in [rows()]), "no generator"), ("train", "got str"), ([], "0 ")]
)
def test_training_data_of_unknown_form_or_without_a_second_round_is_refused(context, data, message):
    with pytest.raises(DataError, match=message):
        prepared(context, steps=2, data=data)
