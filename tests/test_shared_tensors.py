"""A saved front repeats nothing that its networks share, and each of them comes back to the last bit."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import autoprune
from autoprune import SearchResult
from autoprune.result.builders import weights_file
from autoprune.result.shared_tensors import SharedTensors


class Words(nn.Module):
    """Nearly all of it is an embedding of whole words, tied to the last layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(2_000, 16), nn.Linear(16, 32)
        self.back, self.head = nn.Linear(32, 16), nn.Linear(16, 2_000, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        x = self.embedding(words).mean(1)
        return self.head(x + self.back(self.hidden(x).relu()))


def words(seed=0):
    torch.manual_seed(seed)
    return Words().eval()


@pytest.fixture(scope="module")
def found():
    data = torch.randint(0, 2_000, (60, 5), generator=torch.Generator().manual_seed(0))
    space = autoprune.Channels(ignore=["embedding"])
    return autoprune.search(words(), "params <= 99%", data, space=space, trials=20)


def bits(module):
    return {name: tensor.contiguous().view(torch.int32) for name, tensor in module.state_dict().items()}


def size(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.slow
def test_the_tensors_that_no_network_changes_are_written_once(found, tmp_path):
    assert len(found.front) >= 3
    embedding = 2_000 * 16 * 4
    found.save(tmp_path / "all")
    assert embedding < size(tmp_path / "all") < 1.3 * embedding


@pytest.mark.slow
def test_every_network_comes_back_to_the_last_bit_into_a_model_with_other_weights(found, tmp_path):
    found.save(tmp_path / "result")
    loaded = SearchResult.load(tmp_path / "result", words(seed=1))
    for trial in found.front:
        expected = bits(found.build(trial))
        for built in (loaded.build(trial), autoprune.load(weights_file(tmp_path / "result", trial), words(seed=1))):
            assert built.head.weight is built.embedding.weight
            assert bits(built).keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in bits(built).items())


def test_a_loaded_result_is_saved_as_small_again(found, tmp_path):
    found.save(tmp_path / "first")
    SearchResult.load(tmp_path / "first", words(seed=1)).save(tmp_path / "second")
    assert size(tmp_path / "second") == size(tmp_path / "first")
    again = SearchResult.load(tmp_path / "second", words(seed=2)).build(found.front[0])
    expected = bits(found.build(found.front[0]))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in bits(again).items())


def test_one_network_alone_is_one_whole_file(found, tmp_path):
    found.save(tmp_path / "best", weights="best")
    assert [file.name for file in (tmp_path / "best").glob("*.safetensors")] == [
        weights_file(tmp_path, found.best()).name
    ]
    assert load_file(weights_file(tmp_path / "best", found.best())).keys() == found.build().state_dict().keys()


def test_without_the_dense_file_the_message_says_to_keep_both_together(found, tmp_path):
    found.save(tmp_path / "result")
    next((tmp_path / "result").glob("dense-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"need the dense tensors of the same result; copy its folder"):
        SearchResult.load(tmp_path / "result", words()).build(found.front[0])


def test_another_dense_file_in_its_place_is_refused(found, tmp_path):
    from safetensors.torch import save_file

    found.save(tmp_path / "result")
    save_file({"other": torch.ones(2)}, next((tmp_path / "result").glob("dense-*")))
    with pytest.raises(autoprune.FileFormatError, match=r"damaged recipe, or damaged weights"):
        SearchResult.load(tmp_path / "result", words()).build(found.front[0])


def test_a_save_in_the_place_of_another_leaves_one_dense_file(found, tmp_path):
    for _ in range(2):
        found.save(tmp_path / "result", replace=True)
    assert len(list((tmp_path / "result").glob("dense-*"))) == 1


def test_what_differs_in_the_sign_of_a_zero_alone_is_not_left_out():
    dense = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(dense.weight)
    shared = SharedTensors(dense, [{}, {}])
    assert shared.leave_out({"weight": torch.zeros(2, 2)}, {}) == {"weight": "weight"}
    assert shared.leave_out({"weight": -torch.zeros(2, 2)}, {}) == {}
