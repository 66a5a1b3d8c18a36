import random
import subprocess
import sys
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from autoprune.data.batch import (
    batch_size,
    default_forward,
    inputs,
    map_tensors,
    slice_batch,
    targets,
    tensors,
    to_device,
)
from autoprune.data.subsets import PARTS, Data, fingerprint, materialise, synthetic
from autoprune.errors import DataError

Pair = namedtuple("Pair", "left right")


def numbered(n, labels=True):
    """Sample i is the number i, its label i % 3, so that every sample can be followed."""
    x = torch.arange(n, dtype=torch.float32).reshape(n, 1)
    return TensorDataset(x, torch.arange(n) % 3) if labels else TensorDataset(x)


def ids(batches):
    return [int(value) for batch in batches for value in next(tensors(batch)).flatten()]


def ids_by_part(subsets):
    return {part: ids(getattr(subsets, part)) for part in PARTS}


def all_ids(subsets):
    return [value for part in PARTS for value in ids(getattr(subsets, part))]


def batches_of(n, size, read=None):
    """A stream of numbered batches that records in `read` what was taken from it."""
    for start in range(0, n, size):
        if read is not None:
            read.append(start)
        x = torch.arange(start, min(start + size, n), dtype=torch.float32).reshape(-1, 1)
        yield x, x.flatten().long() % 3


class Noisy(TensorDataset):
    """Augments with all three global generators."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(1) + random.random() + float(np.random.rand()), y  # noqa: NPY002


class Stream(IterableDataset):
    def __iter__(self):
        yield from (torch.tensor([float(i)]) for i in range(40))


SOURCES = {
    "loader": lambda: DataLoader(numbered(300), batch_size=16),
    "shuffling loader": lambda: DataLoader(numbered(300), batch_size=16, shuffle=True),
    "weighted loader": lambda: DataLoader(
        numbered(300), batch_size=16, sampler=WeightedRandomSampler([1.0] * 300, num_samples=600)
    ),
    "loader with workers": lambda: DataLoader(numbered(300), batch_size=16, num_workers=2),
    "dataset": lambda: numbered(300),
    "list of batches": lambda: list(batches_of(300, 16)),
    "generator": lambda: batches_of(300, 16),
    "tensors": lambda: numbered(300).tensors,
    "numpy": lambda: tuple(tensor.numpy() for tensor in numbered(300).tensors),
    "unlabelled array": lambda: numbered(300).tensors[0].numpy(),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
class TestEverySource:
    def test_parts_have_the_wanted_samples_and_are_disjoint(self, make):
        data = Data(validation=make(), calibration_samples=40, validation_samples=70, test_samples=50, batch_size=32)
        parts = ids_by_part(materialise(data, seed=0))
        assert {part: len(values) for part, values in parts.items()} == {
            "calibration": 40,
            "validation": 70,
            "test": 50,
        }
        assert len(set().union(*parts.values())) == 160

    def test_it_says_whether_samples_come_in_a_random_order(self, make):
        subsets = materialise(make(), seed=0)
        order = ids(subsets.validation)
        assert subsets.shuffled == (order != sorted(order))

    def test_labels_stay_with_their_samples(self, make):
        subsets = materialise(make(), seed=0)
        for part in PARTS:
            for batch in getattr(subsets, part):
                y = targets(batch)
                assert y is None or torch.equal(y, next(tensors(batch)).flatten().long() % 3)

    def test_same_seed_gives_the_same_samples(self, make):
        assert materialise(make(), seed=5).fingerprint == materialise(make(), seed=5).fingerprint


def test_data_sorted_by_class_is_sampled_over_all_classes():
    dataset = TensorDataset(torch.zeros(1000, 1), torch.arange(1000) // 100)
    subsets = materialise(
        Data(validation=DataLoader(dataset, batch_size=50), calibration_samples=100, validation_samples=100), seed=0
    )
    assert {int(y) for batch in subsets.validation for y in batch[1]} == set(range(10))


def test_other_seeds_give_other_samples():
    loader = DataLoader(numbered(300), batch_size=16)
    data = Data(validation=loader, calibration_samples=40, validation_samples=70, test_samples=50)
    assert materialise(data, seed=1).fingerprint != materialise(data, seed=2).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_repeats_whatever_the_global_random_states(workers):
    def draw():
        return materialise(DataLoader(Noisy(*numbered(60).tensors), batch_size=8, num_workers=workers), seed=3)

    first = draw()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)  # noqa: NPY002
    assert draw().fingerprint == first.fingerprint


@pytest.mark.parametrize("stream", [False, True])
def test_random_states_are_left_as_they_were(stream):
    generator = torch.Generator().manual_seed(7)
    dataset = Noisy(*numbered(60).tensors)
    loader = DataLoader(dataset, batch_size=8, shuffle=True, generator=generator)
    if stream:  # a batch sampler of one's own takes the path that reads the loader in its order
        loader = DataLoader(dataset, batch_sampler=[range(i, i + 4) for i in range(0, 60, 4)], generator=generator)

    def states():
        numpy_state = np.random.get_state()  # noqa: NPY002
        return [
            random.getstate(),
            numpy_state[1].tolist(),
            torch.get_rng_state().tolist(),
            generator.get_state().tolist(),
        ]

    before = states()
    materialise(loader, seed=0)
    assert states() == before


@pytest.mark.slow
def test_another_process_draws_the_same_samples():
    code = (
        "import torch; from torch.utils.data import *; from autoprune.data.subsets import materialise\n"
        "x = torch.arange(300.).reshape(300, 1)\n"
        "print(materialise(DataLoader(TensorDataset(x, x.flatten().long() % 3), 16, shuffle=True), 4).fingerprint)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == materialise(DataLoader(numbered(300), 16, shuffle=True), seed=4).fingerprint


def test_nothing_is_read_beyond_what_is_needed():
    read = []
    data = Data(validation=batches_of(10**6, 10, read), calibration_samples=5, validation_samples=10, test_samples=10)
    assert materialise(data, seed=0).samples == {"calibration": 5, "validation": 10, "test": 10}
    assert read == [0, 10, 20]


def test_an_iterable_dataset_is_batched():
    subsets = materialise(Data(validation=Stream(), batch_size=8), seed=0)
    assert sorted(all_ids(subsets)) == list(range(40))


def test_a_small_source_is_divided_in_proportion():
    subsets = materialise(numbered(900), seed=0)
    assert subsets.samples == {"calibration": 180, "validation": 360, "test": 360}


def test_every_part_of_a_tiny_source_keeps_a_handful():
    assert min(materialise(numbered(13), seed=0).samples.values()) == 4


def test_all_samples_of_a_small_source_are_used():
    for n in range(12, 60):
        assert sorted(all_ids(materialise(numbered(n), seed=n))) == list(range(n))


def test_validation_without_test_sets_samples_aside_and_says_so():
    data = Data(calibration=numbered(50), validation=numbered(900))
    subsets = materialise(data, seed=0)
    assert subsets.samples == {"calibration": 50, "validation": 450, "test": 450}
    assert subsets.notes == (
        "no test data given: 450 of 900 validation samples were set aside before the search, to score only the "
        "finished front",
    )


def test_missing_calibration_comes_from_validation_and_is_noted():
    data = Data(validation=numbered(300), test=numbered(20), calibration_samples=100, validation_samples=200)
    subsets = materialise(data, seed=0)
    assert subsets.samples == {"calibration": 100, "validation": 200, "test": 20}
    assert not set(ids(subsets.calibration)) & set(ids(subsets.validation))
    assert subsets.notes == ("no calibration data given: 100 of 300 validation samples were set aside for calibration",)


def test_validation_is_never_taken_from_test_while_there_is_calibration_data():
    subsets = materialise(Data(calibration=numbered(30), test=numbered(200)), seed=0)
    assert subsets.samples["test"] == 200
    assert subsets.samples["calibration"] + subsets.samples["validation"] == 30


def test_three_sources_are_used_as_they_are():
    data = Data(calibration=numbered(2), validation=numbered(3), test=numbered(1))
    subsets = materialise(data, seed=0)
    assert subsets.samples == {"calibration": 2, "validation": 3, "test": 1}
    assert subsets.notes == ()


def test_one_loader_given_twice_is_divided():
    dataset = numbered(40)
    subsets = materialise(Data(calibration=numbered(9), validation=dataset, test=dataset), seed=0)
    assert not set(ids(subsets.validation)) & set(ids(subsets.test))
    assert "test and validation data are one source" in subsets.notes[0]


class TestFunctionsThatGiveData:
    @staticmethod
    def arrays(shift=0.0):
        return torch.arange(200.0).reshape(100, 2) + shift, torch.arange(100)

    def test_they_give_the_samples_of_what_they_return(self):
        expected = materialise(Data(validation=self.arrays()), seed=0)
        assert materialise(Data(validation=self.arrays), seed=0).fingerprint == expected.fingerprint
        assert materialise(self.arrays, seed=0).fingerprint == expected.fingerprint
        assert materialise(lambda: DataLoader(TensorDataset(*self.arrays())), seed=0).samples == expected.samples

    def test_one_given_for_two_parts_is_one_source(self):
        subsets = materialise(Data(calibration=self.arrays, validation=self.arrays), seed=0)
        labels = torch.cat([batch[1] for part in PARTS for batch in getattr(subsets, part)])
        assert labels.unique().numel() == len(labels) == 100

    def test_their_samples_are_drawn_again_elsewhere_instead_of_sent(self):
        subsets = materialise(self.arrays, seed=3)
        sent = subsets.to_send()
        assert sum(sent.samples.values()) == 0
        received = sent.received()
        assert fingerprint({part: getattr(received, part) for part in PARTS}) == subsets.fingerprint

    def test_beside_data_given_as_they_are_all_samples_are_sent(self):
        subsets = materialise(Data(calibration=self.arrays(1.0), validation=self.arrays), seed=0)
        assert subsets.to_send().received() is subsets

    def test_they_must_give_the_same_everywhere(self):
        calls = iter((0.0, 1.0))
        subsets = materialise(lambda: self.arrays(next(calls)), seed=0)
        with pytest.raises(DataError, match="must give the same in every process"):
            subsets.to_send().received()


def test_batches_are_at_most_the_batch_size_and_never_tiny():
    subsets = materialise(Data(validation=numbered(1000), calibration=numbered(9), batch_size=100), seed=0)
    assert [batch_size(batch) for batch in subsets.validation] == [100] * 5
    subsets = materialise(Data(*[numbered(101)] * 3, batch_size=33), seed=0)
    assert {batch_size(batch) for part in PARTS for batch in getattr(subsets, part)} <= set(range(15, 34))


def test_double_precision_arrays_become_the_default_dtype():
    subsets = materialise((np.random.default_rng(0).random((20, 2)), np.arange(20)), seed=0)
    x, y = subsets.validation[0]
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_pandas_frames_are_arrays():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": np.arange(30.0), "b": np.arange(30.0)})
    x, y = materialise((frame, frame["a"].astype(int)), seed=0).validation[0]
    assert torch.equal(x[:, 0].long(), y)


def test_batches_never_share_memory_with_the_users_tensors():
    x = torch.zeros(20, 1)
    for source in ([(x, x)], (x, x), TensorDataset(x, x)):
        materialise(source, seed=0).validation[0][0].fill_(1.0)
    assert not x.any()


def test_the_device_moves_batches_and_leaves_the_fingerprint():
    subsets = materialise(numbered(20), seed=0, device="meta")
    assert {tensor.device.type for part in PARTS for tensor in tensors(getattr(subsets, part))} == {"meta"}
    assert subsets.fingerprint == materialise(numbered(20), seed=0).fingerprint


def test_the_fingerprint_sees_values_dtypes_and_labels():
    x, y = numbered(24).tensors
    variants = [(x, y), (x + 1e-3, y), (x.double(), y), (x, y + 1), (x, y.int()), (x,), (x.reshape(12, 2), y[:12])]
    assert len({materialise(variant, seed=0).fingerprint for variant in variants}) == len(variants)


def test_names_follow_their_samples():
    source = [{"pixels": torch.arange(4.0) + 4 * i, "name": [str(4 * i + j) for j in range(4)]} for i in range(5)]
    for batch in materialise(source, seed=0).validation:
        assert [int(name) for name in batch["name"]] == batch["pixels"].long().tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param([], "validation data must hold at least 12 samples .* is empty; give", id="empty iterable"),
        pytest.param(DataLoader([]), "at least 12 samples .* is empty; give", id="empty loader"),
        pytest.param((np.empty((0, 3)), np.empty(0)), "at least 12 samples .* is empty; give", id="empty array"),
        pytest.param((np.ones((5, 3)), np.ones(4)), "same length, got 5 and 4; give one label", id="lengths"),
        pytest.param(numbered(11), "at least 12 samples .* has 11 samples; give more", id="too few"),
        pytest.param([["a", "b"]], "a batch must be a tensor, .* got list; convert", id="strings in batches"),
        pytest.param(DataLoader(["a", "b"] * 9), "a batch must be a tensor", id="strings in a dataset"),
        pytest.param((np.array(["a"] * 20),), "must be numeric, got dtype <U1; convert", id="strings in arrays"),
        pytest.param("images/", "must be a DataLoader, .* got str", id="path"),
        pytest.param(7, "must be a DataLoader, .* got int", id="number"),
        pytest.param(Data(), "at least one of calibration, validation and test, got none; to search", id="nothing"),
    ],
)
def test_unusable_data_is_refused_with_the_way_out(data, message):
    with pytest.raises(DataError, match=message):
        materialise(data, seed=0)


@pytest.mark.parametrize("field", ["calibration_samples", "validation_samples", "test_samples", "batch_size"])
def test_counts_must_be_positive_integers(field):
    with pytest.raises(ValueError, match=f"{field} must be an integer of at least 1, got 0"):
        Data(**{field: 0})


class TestSynthetic:
    def test_values_follow_the_example(self):
        generator = torch.Generator().manual_seed(0)
        example = {
            "image": 5 + 2 * torch.randn(8, 100, generator=generator),
            "blank": torch.zeros(8, 100),
            "token": torch.arange(2, 50).reshape(8, 6),
            "mask": torch.ones(8, 6, dtype=torch.long),
            "flag": torch.tensor([[True, False]] * 8),
            "scale": torch.tensor(0.5),
        }
        subsets = synthetic(example, samples=200, seed=0)
        assert subsets.samples == dict.fromkeys(PARTS, 200)
        pool = {key: torch.cat([batch[key] for batch in subsets.validation]) for key in example if key != "scale"}
        assert all(pool[key].dtype == example[key].dtype for key in pool)
        assert (pool["image"].mean() - example["image"].mean()).abs() < 0.1
        assert (pool["image"].std() - example["image"].std()).abs() < 0.1
        assert (pool["blank"].std() - 1).abs() < 0.1
        assert set(pool["token"].flatten().tolist()) == set(range(2, 50))  # ids of padding are often the first
        assert pool["mask"].eq(1).all()
        assert 0.3 < pool["flag"].float().mean() < 0.7
        assert subsets.test[0]["scale"] == 0.5

    def test_parts_differ_and_the_same_seed_repeats(self):
        subsets = synthetic(torch.zeros(1, 3), samples=10, seed=1)
        assert not torch.equal(subsets.validation[0], subsets.test[0])
        assert subsets.fingerprint == synthetic(torch.zeros(1, 3), samples=10, seed=1).fingerprint
        assert subsets.fingerprint != synthetic(torch.zeros(1, 3), samples=10, seed=2).fingerprint

    def test_every_entry_of_a_tuple_is_an_input(self):
        batch = synthetic((torch.zeros(1, 3), torch.zeros(1, 4)), samples=10, seed=0).validation[0]
        assert [tuple(x.shape) for x in inputs(batch)[0]] == [(10, 3), (10, 4)]
        assert targets(batch) is None

    def test_the_note_says_what_scores_mean(self):
        (note,) = synthetic(torch.zeros(1, 3), samples=10, seed=4).notes
        assert note.startswith("no data given: 10 random inputs")
        assert "seed 4" in note
        assert "not how well it does its task" in note


X, X2, Y = torch.arange(6.0).reshape(3, 2), torch.arange(3.0), torch.arange(3)


@pytest.mark.parametrize(
    ("batch", "args", "kwargs", "target"),
    [
        (X, (X,), {}, None),
        ((X,), (X,), {}, None),
        ((X, Y), (X,), {}, Y),
        ([X, X2, Y], (X, X2), {}, Y),
        (Pair(X, Y), (X,), {}, Y),
        ({"a": X, "labels": Y}, (), {"a": X}, Y),
        ({"a": X, "label": Y}, (), {"a": X}, Y),
        (UserDict(a=X), (), {"a": X}, None),
        (((X, X2), Y), ((X, X2),), {}, Y),
    ],
)
class TestBatchForms:
    def test_inputs_and_targets_are_told_apart(self, batch, args, kwargs, target):
        assert inputs(batch) == (args, kwargs)
        assert targets(batch) is target

    def test_slices_and_moves_keep_the_form(self, batch, args, kwargs, target):
        assert batch_size(batch) == 3
        part = to_device(slice_batch(batch, 1, 3), "cpu")
        assert type(part) is type(batch)
        for whole, cut in zip(tensors(batch), tensors(part), strict=True):
            assert torch.equal(whole[1:3], cut)


def test_entries_that_are_not_per_sample_pass_through_a_slice():
    batch = {
        "x": X,
        "grid": torch.zeros(7, 7),
        "scale": torch.tensor(2.0),
        "size": (640, 480),
        "names": ["a", "b", "c"],
    }
    part = slice_batch(batch, 0, 2)
    assert part["grid"].shape == (7, 7)
    assert (part["scale"], part["size"], part["names"]) == (2.0, (640, 480), ["a", "b"])


def test_map_tensors_leaves_the_original_alone():
    batch = {"a": [X, {"b": X2}], "c": "text"}
    doubled = map_tensors(lambda tensor: 2 * tensor, batch)
    assert torch.equal(doubled["a"][1]["b"], 2 * X2)
    assert batch["a"][1]["b"] is X2
    assert doubled["c"] == "text"


def test_the_default_forward_passes_all_inputs():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    assert torch.equal(default_forward(Sum(), (X2, X2, Y)), 2 * X2)
    assert torch.equal(default_forward(Sum(), {"b": X2, "a": X2, "labels": Y}), 2 * X2)


class Several(nn.Module):
    def forward(self, x, t):
        return x + t


class Single(nn.Module):
    def forward(self, pair):
        return pair[0] - pair[1]


@pytest.mark.parametrize("batch", [((1, 2), 3), ([1, 2], 3), ({"t": 2, "x": 1}, 3), (1, 2, 3)], ids=str)
def test_inputs_in_a_tuple_or_dict_are_the_arguments_of_a_forward_that_takes_several(batch):
    assert default_forward(Several(), batch) == 3


def test_a_forward_of_one_argument_gets_inputs_in_a_tuple_as_they_are():
    assert default_forward(Single(), ((5, 2), 0)) == 3


def test_inputs_that_fit_neither_way_are_refused_by_the_model():
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        default_forward(Several(), ((1, 2, 3), 0))
