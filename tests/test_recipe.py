"""Saved pruned models: identical outputs from the user's own class, and clear refusals."""

import copy
import json
import os
import pickle
import stat
import sys

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import autoprune
from autoprune.errors import FileFormatError
from autoprune.files.tensor_file import HASH, content_hash, write_tensors
from autoprune.protocols import Pruning
from autoprune.result.recipe import ATTRIBUTE, attach
from autoprune.search_spaces import Channels
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from zoo import ZOO


def half(name, seed=0, model=None):
    """A network, from the zoo by default, with half of the units of every group, chosen at random."""
    model = model or ZOO[name].build()
    structure = analyse(Example(model, ZOO[name].inputs()))
    rng = np.random.default_rng(seed)
    order = {group.name: rng.permutation(group.size).tolist() for group in structure.groups}
    space = Channels(options=(1.0, 0.5)).bind(structure, order)
    edit = structure.edit(space.pruning([1] * len(space.dimensions)))
    return attach(structure.build(model, space.pruning([1] * len(space.dimensions))), edit, model)


def fresh(name):
    """The same class with other weights."""
    model = ZOO[name].build()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2.0)
    return model


def tensors(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else [*outputs["scores"], outputs["boxes"]]


NETWORKS = ["mlp", "resnet20", "mobilenet_v2", "resnext", "densenet", "tied", "tied_autoencoder", "shared", "detector"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_model_with_other_weights_gives_identical_outputs(name, tmp_path):
    built, inputs = half(name), ZOO[name].inputs()
    autoprune.save(built, tmp_path / "small.safetensors")
    loaded = autoprune.load(tmp_path / "small.safetensors", fresh(name))
    assert type(loaded) is type(built)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in built.parameters())
    assert sum(p.numel() for p in built.parameters()) < sum(p.numel() for p in ZOO[name].build().parameters())
    for a, b in zip(tensors(loaded(*inputs)), tensors(built(*inputs)), strict=True):
        assert torch.equal(a, b)
    assert str(loaded) == str(built)


@pytest.mark.slow
def test_tied_weights_stay_tied(tmp_path):
    autoprune.save(half("tied"), tmp_path / "small.safetensors")
    loaded = autoprune.load(tmp_path / "small.safetensors", fresh("tied"))
    assert loaded.first.weight is loaded.second.weight


@pytest.mark.slow
def test_the_fresh_model_stays_as_it_is_and_gives_its_mode(tmp_path):
    autoprune.save(half("resnet20"), tmp_path / "small.safetensors")
    model = fresh("resnet20").train()
    before = copy.deepcopy(model.state_dict())
    assert autoprune.load(tmp_path / "small.safetensors", model).training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, ATTRIBUTE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnext", "densenet", "tied_autoencoder"])
def test_pruning_twice_leaves_one_recipe_from_the_first_model(name, tmp_path):
    dense, inputs = ZOO[name].build(), ZOO[name].inputs()
    twice = half(name, seed=1, model=half(name))
    recipe, state, original = getattr(twice, ATTRIBUTE), twice.state_dict(), dense.state_dict()
    for tensor, dims in recipe["slices"].items():
        expected = original[tensor]
        for dim, kept in dims.items():
            expected = expected.index_select(int(dim), torch.tensor(kept))
        assert torch.equal(state[tensor], expected), tensor
    autoprune.save(twice, tmp_path / "small.safetensors")
    assert torch.equal(autoprune.load(tmp_path / "small.safetensors", fresh(name))(*inputs), twice(*inputs))


@pytest.mark.slow
def test_fine_tuned_weights_are_saved(tmp_path):
    built, (x,) = half("resnet20").train(), ZOO["resnet20"].inputs()
    optimizer = torch.optim.SGD(built.parameters(), 0.1)
    F.cross_entropy(built(x), torch.tensor([1, 2])).backward()
    optimizer.step()
    built.eval()
    assert not torch.equal(built(x), half("resnet20")(x))
    autoprune.save(built, tmp_path / "small.safetensors")
    assert torch.equal(autoprune.load(tmp_path / "small.safetensors", fresh("resnet20"))(x), built(x))


@pytest.mark.slow
def test_a_loaded_model_is_saved_again(tmp_path):
    built, (x,) = half("resnext"), ZOO["resnext"].inputs()
    autoprune.save(built, tmp_path / "first.safetensors")
    autoprune.save(autoprune.load(tmp_path / "first.safetensors", fresh("resnext")), tmp_path / "second.safetensors")
    assert torch.equal(autoprune.load(tmp_path / "second.safetensors", fresh("resnext"))(x), built(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
    ],
    ids=["deepcopy", "pickle", "DataParallel", "compile"],
)
def test_copies_and_wrappers_keep_the_recipe(copied, tmp_path):
    built, (x,) = half("mlp"), ZOO["mlp"].inputs()
    autoprune.save(copied(built), tmp_path / "small.safetensors")
    assert torch.equal(autoprune.load(tmp_path / "small.safetensors", fresh("mlp"))(x), built(x))


@pytest.mark.slow
def test_the_file_is_safetensors_that_other_tools_read(tmp_path):
    built = half("mlp")
    autoprune.save(built, tmp_path / "small.safetensors")
    state = load_file(tmp_path / "small.safetensors")
    assert state.keys() == built.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in built.state_dict().items())


def test_a_module_that_was_not_built_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(autoprune.FileFormatError, match=r"must come from result.build\(\), but Sequential.*torch.save"):
        autoprune.save(ZOO["mlp"].build(), tmp_path / "small.safetensors")


class TestRefusals:
    @pytest.fixture
    def file(self, tmp_path):
        autoprune.save(half("mlp"), tmp_path / "small.safetensors")
        return tmp_path / "small.safetensors"

    @pytest.mark.slow
    def test_other_widths_are_named_with_both_shapes(self, file):
        model = nn.Sequential(*list(ZOO["mlp"].build().children()))
        model[0] = nn.Linear(64, 50)
        with pytest.raises(
            autoprune.FileFormatError, match=r"'0.weight' has shape \[48, 64\].*has \[50, 64\]; pass a dense"
        ):
            autoprune.load(file, model)

    @pytest.mark.slow
    def test_another_class_is_named_with_the_tensor_it_lacks(self, file):
        with pytest.raises(
            autoprune.FileFormatError, match=r"'0.weight' has shape \[48, 64\].*ResNet has no such tensor"
        ):
            autoprune.load(file, ZOO["resnet20"].build())

    @pytest.mark.slow
    def test_a_pruned_model_in_place_of_the_dense_one_is_refused(self, file):
        with pytest.raises(autoprune.FileFormatError, match=r"has \[24, 64\]; pass a dense model"):
            autoprune.load(file, half("mlp"))

    @pytest.mark.slow
    def test_a_layer_that_was_not_pruned_and_differs_is_named(self, tmp_path):
        model = ZOO["mlp"].build()
        edit = analyse(Example(model, ZOO["mlp"].inputs())).edit(autoprune.Pruning())
        autoprune.save(attach(copy.deepcopy(model), edit, model), tmp_path / "dense.safetensors")
        model[9] = nn.Linear(24, 7)
        with pytest.raises(
            autoprune.FileFormatError, match=r"(?s)was not made for this Sequential.*9\.weight.*\[10, 24\].*\[7, 24\]"
        ):
            autoprune.load(tmp_path / "dense.safetensors", model)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"written by autoprune.save, got .*nowhere: no such file"):
            autoprune.load(tmp_path / "nowhere", ZOO["mlp"].build())

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: content[:-100],
            lambda content: content[:50],
            lambda content: b"",
            lambda content: b"PK\x03" * 99,
        ],
        ids=["truncated", "header truncated", "empty", "other format"],
    )
    def test_a_corrupted_file_is_named(self, file, damage):
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(
            autoprune.FileFormatError, match=r"small.safetensors is not a safetensors file or is corrupted"
        ):
            autoprune.load(file, ZOO["mlp"].build())

    @pytest.mark.slow
    def test_safetensors_of_another_tool_are_named(self, file):
        for metadata in (None, {"format": "pt"}):
            save_file({"0.weight": torch.zeros(2)}, file, metadata=metadata)
            with pytest.raises(
                autoprune.FileFormatError,
                match=r"is not a pruned model of autoprune.* another tool or an earlier version wrote it",
            ):
                autoprune.load(file, ZOO["mlp"].build())

    @pytest.mark.slow
    def test_a_newer_version_is_named_with_the_way_out(self, file):
        save_file(load_file(file), file, metadata={"format": "autoprune-model", "version": "2", "recipe": "{}"})
        with pytest.raises(autoprune.FileFormatError, match="it has version 2, and this autoprune reads 1: use"):
            autoprune.load(file, ZOO["mlp"].build())

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "damage",
        [
            lambda recipe: json.dumps(recipe)[:-1],
            lambda recipe: "[]",
            lambda recipe: "{}",
            lambda recipe: json.dumps({**recipe, "slices": []}),
            lambda recipe: json.dumps({**recipe, "slices": {}}),
            lambda recipe: json.dumps({**recipe, "slices": {"0.weight": {"0": [0, 99]}}}),
        ],
    )
    def test_a_damaged_recipe_is_named(self, file, damage):
        recipe = damage(getattr(half("mlp"), ATTRIBUTE))
        save_file(load_file(file), file, metadata={"format": "autoprune-model", "version": "1", "recipe": recipe})
        with pytest.raises(
            autoprune.FileFormatError, match=r"small.safetensors (holds a damaged recipe|was not made for)"
        ):
            autoprune.load(file, ZOO["mlp"].build())

    @pytest.mark.slow
    def test_a_flipped_bit_in_the_weights_is_named(self, file):
        content = bytearray(file.read_bytes())
        content[-10] ^= 4
        file.write_bytes(content)
        with pytest.raises(
            autoprune.FileFormatError, match="damaged weights: its content is not that of its hash; save"
        ):
            autoprune.load(file, ZOO["mlp"].build())

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"attributes": {"0": {"forward": 3}}}, "it sets 0.forward, which is no whole number in this Linear"),
            ({"attributes": {"0": {"training": 1}}}, "it sets 0.training, which is no whole number"),
            ({"attributes": {"0": {"weight.data": 1}}}, "it sets 0.weight.data, which is no whole number"),
            ({"attributes": {"0": {"out_features": "24"}}}, "must be a whole number, got '24'"),
            ({"attributes": {"0": {"out_features": True}}}, "must be a whole number, got True"),
            ({"attributes": {"99": {"out_features": 1}}}, "was not made for this Sequential"),
            ({"slices": {"0.weight": {"0": [0, 0]}}}, "must be different numbers from 0 to 47"),
            ({"slices": {"0.weight": {"0": [-1]}}}, "must be different numbers from 0 to 47"),
            ({"slices": {"0.weight": {"0": [48]}}}, "must be different numbers from 0 to 47"),
            ({"slices": {"0.weight": {"7": [1]}}}, "holds a damaged recipe"),
            ({"slices": {"0.weight": {"0": [2**70]}}}, "must be different numbers"),
            ({"dense_shapes": {"0.weight": "48"}}, "must be a list"),
        ],
    )
    def test_a_recipe_that_would_set_anything_but_sizes_is_refused(self, file, change, message):
        recipe = getattr(half("mlp"), ATTRIBUTE)
        text = json.dumps({**recipe, **{part: {**recipe[part], **new} for part, new in change.items()}})
        state = load_file(file)
        header = {"format": "autoprune-model", "version": "1", HASH: content_hash(state, text), "recipe": text}
        write_tensors(file, state, header)
        model = ZOO["mlp"].build()
        with pytest.raises(autoprune.FileFormatError, match=message):
            autoprune.load(file, model)
        assert model[0].out_features == 48
        assert callable(model[0].forward)

    @pytest.mark.slow
    def test_what_is_no_model_is_named(self, file):
        with pytest.raises(TypeError, match=r"fresh_model must be a dense nn.Module of the class .*, got str"):
            autoprune.load(file, "mlp")


class TestWriting:
    @pytest.mark.slow
    def test_the_file_gets_the_permissions_that_the_umask_leaves(self, tmp_path):
        before = os.umask(0o022)
        try:
            autoprune.save(half("mlp"), tmp_path / "small.safetensors")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "small.safetensors").stat().st_mode) == 0o644

    @pytest.mark.slow
    def test_a_missing_folder_a_device_and_a_fifo_are_refused_in_words(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        small = half("mlp")
        with pytest.raises(FileNotFoundError, match=r"path must lie in a folder that exists, got .*; make the folder"):
            autoprune.save(small, tmp_path / "nowhere" / "small.safetensors")
        for place in (tmp_path / "fifo", "/dev/null"):
            with pytest.raises(FileExistsError, match=r"path must be free, but there is a (FIFO|device) at"):
                autoprune.save(small, place)
        assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)

    @pytest.mark.slow
    def test_a_full_disk_is_named_and_leaves_the_old_file(self, tmp_path, monkeypatch):
        file = tmp_path / "small.safetensors"
        autoprune.save(half("mlp"), file)
        before = file.read_bytes()

        def full(*args, **options):
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match=r"path could not be written to .*small.safetensors: no space is left; free"):
            autoprune.save(half("mlp", seed=1), file)
        assert file.read_bytes() == before
        assert list(tmp_path.iterdir()) == [file]


class WithoutArguments(nn.Module):
    """A class that a file may name, because it takes no arguments."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def named(tmp_path):
    """A pruned model of that class, and its file."""
    model = WithoutArguments()
    structure = analyse(Example(model, (torch.ones(2, 6),)))
    pruning = Pruning({group.name: tuple(range(5)) for group in structure.groups})
    small = attach(structure.build(model, pruning), structure.edit(pruning), model)
    autoprune.save(small, tmp_path / "small.safetensors")
    return small, tmp_path / "small.safetensors"


def test_a_file_of_a_class_without_arguments_is_loaded_alone(named):
    small, path = named
    before = torch.random.get_rng_state()
    loaded = autoprune.load(path)
    assert torch.equal(before, torch.random.get_rng_state())
    assert type(loaded) is WithoutArguments
    assert torch.equal(loaded(torch.ones(4, 6)), small(torch.ones(4, 6)))


def test_a_file_without_a_class_to_make_asks_for_a_model(tmp_path):
    autoprune.save(half("mlp"), tmp_path / "small.safetensors")
    with pytest.raises(FileFormatError, match="names no class that is made without arguments; pass fresh_model"):
        autoprune.load(tmp_path / "small.safetensors")


@pytest.mark.parametrize(
    "path", ["os:abort", "antigravity:Net", "torch.nn:Linear", "torch:nn.Module.x", "nothing", ":"]
)
def test_a_file_makes_nothing_be_imported_or_called_but_a_class_of_modules(path, named):
    small, file = named
    getattr(small, ATTRIBUTE)["class"] = path
    autoprune.save(small, file)
    with pytest.raises(FileFormatError, match="no class of models that is imported and made without"):
        autoprune.load(file)
    assert "antigravity" not in sys.modules
