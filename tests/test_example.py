"""Examples: a model with one call of it, resized, moved, of another model and of a batch."""

import pytest
import torch
from torch import nn

from autoprune.errors import DataError
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.tracing.trace import trace


class Scaled(nn.Module):
    """A linear layer of inputs times a factor, as a dict."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, *, factor=1.0):
        return {"y": self.layer(x) * factor, "sum": x.sum(1)}


def test_without_a_forward_it_calls_its_model():
    model, x = Scaled().eval(), torch.randn(2, 4)
    made = Example(model, (x,), {"factor": 3.0})()
    assert torch.equal(made["y"], model(x, factor=3.0)["y"])


def test_outputs_are_selected_from_what_the_forward_returns():
    example = Example(Scaled(), (torch.ones(2, 4),))
    assert torch.equal(example.selecting("sum")(), torch.full((2,), 4.0))
    assert len(example.selecting(["y", "sum"])()) == 2
    with pytest.raises(DataError, match="outputs must select"):
        example.selecting("none")()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_samples_are_repeated_and_values_without_samples_stay(n):
    x, table = torch.arange(12.0).reshape(3, 4), torch.arange(5.0)
    example = Example(Scaled(), ([x, "name"],), {"table": table, "factor": torch.tensor(2.0)}).resized(n)
    ([resized, name],) = example.args
    assert torch.equal(resized, x[[0, 1, 2, 0, 1][:n]])
    assert name == "name"
    assert torch.equal(example.kwargs["table"], table)
    assert example.samples == n


def test_inputs_that_cannot_be_cut_count_as_one_sample():
    nodes, edges = torch.randn(7, 4), torch.randint(0, 7, (2, 9))
    example = Example(Scaled(), (nodes, edges))
    assert (example.divisible, example.samples) == (False, 1)
    assert example.resized(1).args == example.args
    with pytest.raises(ValueError, match="batch must be 1 for inputs that cannot be cut by samples"):
        example.resized(2)


def test_resizing_needs_samples_and_drops_further_calls():
    with pytest.raises(ValueError, match="dimension for samples"):
        Example(Scaled(), (torch.tensor(1.0),)).resized(2)
    x = torch.ones(2, 4)
    assert Example(Scaled(), (x,), further=[((x,), {"factor": 2.0})]).resized(3).further == ()


def test_every_call_is_moved():
    x = torch.ones(2, 4)
    moved = Example(Scaled(), (x,), {"factor": x[0, 0]}, further=[((x[:1],), {})]).on("meta")
    assert all(tensor.is_meta for args, kwargs in moved.inputs for tensor in (*args, *kwargs.values()))
    assert not x.is_meta


def test_another_model_runs_on_the_same_inputs():
    x, other = torch.randn(2, 4), Scaled()
    assert torch.equal(Example(Scaled(), (x,)).selecting("y").of(other)(), other(x)["y"])


class Tokens(dict):
    """A mapping with attributes, as tokenizers return."""

    def __getattr__(self, name):
        return self[name]


def of_tokens(model, batch):
    return model(batch.x, factor=batch.factor)["y"]


def test_a_batch_keeps_its_containers_and_is_given_back():
    model, batch = Scaled().eval(), Tokens(x=torch.randn(3, 4), factor=2.0, labels=torch.arange(3))
    example = Example.of_batch(model, batch, of_tokens, [Tokens(x=torch.ones(1, 4), factor=3.0)])
    assert torch.equal(example(), of_tokens(model, batch))
    assert type(example.batch) is Tokens
    assert example.batch.factor == 2.0
    assert [example.samples, example.resized(5).samples] == [3, 5]
    assert example.resized(5).batch.labels.tolist() == [0, 1, 2, 0, 1]
    assert [group.size for group in analyse(example).groups] == []
    assert trace(example).batch == 3


def test_the_batch_of_a_call_is_what_a_forward_of_batches_gets():
    x = torch.ones(2, 4)
    assert Example(Scaled(), (x,)).batch is x
    assert Example(Scaled(), (x, 1)).batch == (x, 1, None)
    assert Example(Scaled(), (), {"x": x}).batch == {"x": x}


def test_a_private_copy_runs_as_traced_and_leaves_buffers_alone():
    model = nn.BatchNorm1d(4).train()
    example = Example(model, (torch.randn(8, 4),))
    before = model.running_mean.clone()
    found = example.as_traced()()
    assert torch.equal(found, example.of(nn.BatchNorm1d(4).eval())())
    assert torch.equal(model.running_mean, before)
    assert model.training
