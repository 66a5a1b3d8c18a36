"""Batches that cannot be cut by samples, such as graphs: they are used as a whole, or not at all."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import autoprune
from autoprune.data.batch import Batch, batch_size, beginning, divisible, pieces, slice_batch
from autoprune.data.subsets import Data, materialise, synthetic
from autoprune.errors import DataError
from autoprune.evaluators.scoring.out_of_memory import Halving

CLASSES = 3


class GraphNet(nn.Module):
    """Sums over neighbours, and a mean over the nodes of each graph."""

    def __init__(self, nodes: bool = False):
        super().__init__()
        self.nodes = nodes
        self.first, self.second, self.head = nn.Linear(5, 16), nn.Linear(16, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = layer(x)
            x = F.relu(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))
        if self.nodes:
            return self.head(x)
        count = int(graph[-1]) + 1
        total = torch.zeros(count, x.shape[1], dtype=x.dtype).index_add(0, graph, x)
        return self.head(total / torch.bincount(graph, minlength=count).unsqueeze(1))


def graph(rng: np.random.Generator) -> tuple[Tensor, Tensor, int]:
    nodes = int(rng.integers(4, 9))
    x = torch.from_numpy(rng.normal(size=(nodes, 5)).astype(np.float32))
    edges = torch.from_numpy(rng.integers(0, nodes, (2, 2 * nodes + 1)))
    return x, edges, int(x.mean(0)[:CLASSES].argmax())


def collated(graphs: list[tuple[Tensor, Tensor, int]]) -> Batch:
    starts = [0, *itertools.accumulate(len(x) for x, _, _ in graphs)]
    return (
        torch.cat([x for x, _, _ in graphs]),
        torch.cat([edges + start for (_, edges, _), start in zip(graphs, starts, strict=False)], dim=1),
        torch.cat([torch.full((len(x),), i) for i, (x, _, _) in enumerate(graphs)]),
        torch.tensor([label for _, _, label in graphs]),
    )


def graphs(n: int, seed: int = 0) -> list[tuple[Tensor, Tensor, int]]:
    rng = np.random.default_rng(seed)
    return [graph(rng) for _ in range(n)]


def stream(n: int = 12, size: int = 10) -> list[Batch]:
    made = graphs(n * size)
    return [collated(made[start : start + size]) for start in range(0, len(made), size)]


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GraphNet().eval()


WHOLE = {
    "graphs": stream(1)[0],
    "nodes": (torch.ones(7, 5), torch.zeros(2, 9).long(), torch.arange(7)),
    "as a dict": {"x": torch.ones(7, 5), "edges": torch.zeros(2, 9).long(), "labels": torch.arange(7)},
    "boxes of all images": (torch.ones(4, 3, 8, 8), torch.ones(9, 6)),
    "boxes in lists": (torch.ones(4, 3, 8, 8), [torch.ones(n, 4) for n in (2, 5, 1, 0)]),
}
CUT = {
    "samples": (torch.ones(4, 3), torch.arange(4)),
    "one for all": (torch.ones(4, 3), torch.arange(9).unsqueeze(0), torch.arange(4)),
    "floats for all": {"x": torch.ones(4, 3), "grid": torch.zeros(7, 7), "labels": torch.arange(4)},
    "a mapping for each": (torch.ones(4, 3, 8, 8), [{"boxes": torch.ones(n, 4)} for n in (2, 5, 1, 0)]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_refers_to_other_rows_is_never_cut(name):
    batch = WHOLE[name]
    assert not divisible(batch)
    assert pieces(batch, 1) == [batch]
    assert beginning([batch, batch], 1) == [batch]
    with pytest.raises(DataError, match="must hold one row for each sample to be cut"):
        slice_batch(batch, 0, 1)


@pytest.mark.parametrize("name", CUT)
def test_what_has_a_row_for_each_sample_is_cut(name):
    batch = CUT[name]
    assert divisible(batch)
    assert [batch_size(part) for part in pieces(batch, 3)] == [3, 1]


def test_a_list_of_mappings_is_cut_by_samples():
    _, targets = slice_batch(CUT["a mapping for each"], 1, 3)
    assert [len(target["boxes"]) for target in targets] == [5, 1]


def test_samples_are_those_of_the_target():
    assert batch_size(stream(1, size=10)[0]) == 10
    assert batch_size(WHOLE["nodes"]) == 7


def test_running_out_of_memory_on_such_a_batch_is_the_error_it_is():
    def run(parts: list[Batch]) -> None:
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError):
        Halving()(run, [WHOLE["graphs"]])


def test_a_stream_of_them_is_dealt_out_in_whole_batches():
    batches = stream(12)
    subsets = materialise(Data(validation=batches, calibration_samples=30, validation_samples=60, test_samples=30), 0)
    dealt = [*subsets.calibration, *subsets.validation, *subsets.test]
    assert [len(part) for part in (subsets.calibration, subsets.validation, subsets.test)] == [3, 6, 3]
    for given, drawn in zip(batches, dealt, strict=True):
        assert all(map(torch.equal, given, drawn))
    with pytest.raises(DataError, match=r"at least 3 batches to serve as .* such batches cannot be cut, but it has 2"):
        materialise(Data(validation=batches[:2]), 0)


def test_random_graphs_have_the_edges_of_the_example():
    x, edges, ids, _ = stream(1)[0]
    subsets = synthetic((x, edges, ids), 256, 0)
    assert sum(len(batch[0]) for batch in subsets.validation) >= 256
    for batch in (*subsets.calibration, *subsets.validation):
        assert batch[0].shape == x.shape
        assert not torch.equal(batch[0], x)
        assert torch.equal(batch[1], edges)
        assert torch.equal(batch[2], ids)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["stream", "loader"])
@pytest.mark.parametrize("example", [False, True])
def test_a_search_over_graphs(net, data, example):
    given = stream() if data == "stream" else DataLoader(graphs(120), batch_size=10, collate_fn=collated)
    example_inputs = stream(1, size=3)[0][:3] if example else None
    result = autoprune.search(net, "flops <= 60%", given, trials=6, example=example_inputs)
    assert result.metric == "accuracy"
    assert any(note.startswith("batches are used as a whole") for note in result.notes)
    x, edges, ids, _ = stream(1, size=7)[0]
    small = result.build()
    assert small(x, edges, ids).shape == (7, CLASSES)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    first = example_inputs or (given[0] if data == "stream" else None)
    if first is not None:
        nodes, count = len(first[0]), int(first[2][-1]) + 1
        assert result.dense.costs["flops"] == nodes * (5 * 16 + 16 * 12) + count * 12 * CLASSES


@pytest.mark.slow
@pytest.mark.parametrize("supervised", [True, False])
def test_a_search_over_nodes(supervised):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = GraphNet(nodes=True).eval()
    batches = [(*batch[:3], batch[0][:, :CLASSES].argmax(1)) for batch in stream()]
    data = batches if supervised else None
    example = None if supervised else batches[0][:3]
    result = autoprune.search(net, "flops <= 60%", data, trials=4, example=example)
    assert result.metric == ("accuracy" if supervised else "agreement")
    assert result.front
    assert result.build()(*batches[1][:3]).shape == (len(batches[1][0]), CLASSES)


@pytest.mark.slow
def test_a_latency_is_of_one_batch_as_it_is(net):
    with pytest.raises(ValueError, match=r"cost_batch must be 1 for inputs that cannot be cut by samples.*got 4"):
        autoprune.search(net, "latency <= 60%", stream(), trials=2, example=autoprune.Call(cost_batch=4))
