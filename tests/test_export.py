"""Exported files: read by the runtimes themselves, they give the module's outputs at sizes that no export has seen."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.errors import UnsupportedModelError
from autoprune.result.exporting.export import export
from autoprune.result.exporting.parity import Outputs, compare
from autoprune.result.exporting.torch_program import METADATA
from tests.uneven import uneven
from zoo.hf import HF_ZOO

without_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnxscript")
ENDINGS = [pytest.param(".onnx", marks=[pytest.mark.slow, without_onnx]), ".pt2"]


class Images(nn.Module):
    """Convolution, batch norm in its own statistics, and a classifier."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image).mean((2, 3)))


class Tokens(nn.Module):
    """Reads tokens with a mask, by keywords, and returns a nested dictionary."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)

    def forward(self, ids: Tensor, mask: Tensor, scale: float = 1.0) -> dict[str, Tensor | list[Tensor]]:
        x = self.mix(self.words(ids)) * mask[..., None] * scale
        return {"states": x, "pooled": [x.sum(1), x.amax(1)]}


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(batch))


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(11, (batch, length), generator=generator)
    return {"ids": ids, "mask": torch.randint(2, (batch, length), generator=generator)}


def run(path: Path, *args: Tensor, **kwargs: Tensor) -> list[Tensor]:
    """Run a file as a user of its runtime does."""
    if path.suffix == ".pt2":
        leaves, _ = torch.utils._pytree.tree_flatten(torch.export.load(path).module()(*args, **kwargs))
        return leaves
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, args, strict=False)}
    feed |= {name: tensor.numpy() for name, tensor in kwargs.items()}
    return [torch.from_numpy(found) for found in session.run(None, feed)]


def metadata(path: Path) -> dict:
    if path.suffix == ".pt2":
        held = {METADATA: ""}
        torch.export.load(path, extra_files=held)
        return json.loads(held[METADATA])
    import onnx

    return json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}["autoprune"])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_gives_the_outputs_of_the_module_for_another_batch(ending, tmp_path):
    model = Images().train()
    model.body[1].running_mean.fill_(0.3)
    written = autoprune.export(model, tmp_path / f"small{ending}", images(1))
    assert model.training
    (found,) = run(written.path, images(5))
    torch.testing.assert_close(found, model.eval()(images(5)).detach(), rtol=1e-5, atol=1e-6)
    assert written.dynamic == {"image": {0: "batch"}}
    assert written.notes == ()


@pytest.mark.parametrize("ending", ENDINGS)
def test_inputs_by_keyword_may_have_any_length_and_constants_are_no_inputs(ending, tmp_path):
    model = Tokens()
    example = {"mask": tokens(2, 6)["mask"], "scale": 0.5, "ids": tokens(2, 6)["ids"]}
    written = autoprune.export(model, tmp_path / f"small{ending}", example)
    assert written.dynamic == {name: {0: "batch", 1: "sequence"} for name in ("ids", "mask")}
    expected = model(**tokens(3, 9), scale=0.5)
    for ours, theirs in zip([expected["states"], *expected["pooled"]], run(written.path, **tokens(3, 9)), strict=True):
        torch.testing.assert_close(theirs, ours.detach())


@pytest.mark.slow
@without_onnx
def test_inputs_outputs_and_sizes_of_an_onnx_file_have_the_names_of_the_model(tmp_path):
    import onnx

    written = autoprune.export(Tokens(), tmp_path / "small.onnx", tokens(2, 6))
    graph = onnx.load(written.path).graph
    sizes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert sizes == {"ids": ["batch", "sequence"], "mask": ["batch", "sequence"]}
    assert [node.name for node in graph.output] == ["states", "pooled_0", "pooled_1"]
    onnx.checker.check_model(onnx.load(written.path), full_check=True)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_difference_is_in_the_file_and_paths_of_the_machine_are_not(ending, tmp_path):
    written = autoprune.export(Images(), tmp_path / f"small{ending}", images(2))
    found = metadata(written.path)
    assert found["parity"]["largest_difference"] == written.parity.absolute <= 1e-5
    assert found["parity"]["calls"] == ["float32 (2, 3, 9, 9)", "float32 (3, 3, 9, 9)"]
    assert found["dynamic"] == {"image": {"0": "batch"}}
    assert Path(__file__).name.encode() not in written.path.read_bytes()


class Lies(nn.Module):
    """Computes something else while it is exported."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (1.001 if torch.compiler.is_exporting() else 1.0)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_with_other_outputs_is_not_written_and_an_earlier_one_stays(ending, tmp_path):
    path = tmp_path / f"small{ending}"
    path.write_text("earlier")
    with pytest.raises(UnsupportedModelError, match=r"differs from the module's by up to .*0\.0001 is allowed"):
        autoprune.export(Lies(), path, torch.randn(2, 4))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "earlier"
    assert autoprune.export(Lies(), path, torch.randn(2, 4), tolerance=0.01).parity.relative > 0.0005


class Factors(nn.Module):
    """Uses a factorisation, which ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x @ x.mT)


@pytest.mark.slow
@without_onnx
def test_an_operation_that_onnx_lacks_is_named_and_the_other_format_works(tmp_path):
    x = torch.randn(2, 3, 3)
    with pytest.raises(UnsupportedModelError, match=r"ONNX at aten\._?linalg_svd.*format='torch'"):
        autoprune.export(Factors(), tmp_path / "small.onnx", x)
    written = autoprune.export(Factors(), tmp_path / "small.pt2", x)
    torch.testing.assert_close(run(written.path, x)[0], Factors()(x))


class Branches(nn.Module):
    """Decides by a value, which no trace can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


def test_a_model_that_decides_by_values_is_refused_with_the_place(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"Branches cannot be exported.*test_export\.py:\d+ \(forward\)"):
        autoprune.export(Branches(), tmp_path / "small.pt2", torch.randn(2, 4))
    assert list(tmp_path.iterdir()) == []


class Pairs(nn.Module):
    """Its code takes the batch for a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1) * 2.0


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_batch_that_the_code_fixes_is_fixed_with_a_note(ending, tmp_path):
    written = autoprune.export(Pairs(), tmp_path / f"small{ending}", torch.randn(2, 4))
    assert written.dynamic == {}
    assert any("batch has a fixed size" in note for note in written.notes)
    if ending == ".onnx":
        import onnx

        (node,) = onnx.load(written.path).graph.input
        assert [dim.dim_value for dim in node.type.tensor_type.shape.dim] == [2, 4]
    assert "the sizes of the example" in str(written)


class Counts(nn.Module):
    """Asks for the number of samples in Python, which one of the two tracers takes for a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), 2, -1).sum(1) * 3.0


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_batch_that_the_code_asks_for_in_python_has_any_size(ending, tmp_path):
    written = autoprune.export(Counts(), tmp_path / f"small{ending}", torch.randn(2, 4))
    assert written.dynamic == {"x": {0: "batch"}}
    x = torch.randn(7, 4)
    torch.testing.assert_close(run(written.path, x)[0], Counts()(x))


class Wraps(nn.Module):
    """Takes a remainder by a size, for which ONNX has no translation where the size is free."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0).long() % x.shape[0]


@pytest.mark.slow
@without_onnx
def test_sizes_are_fixed_in_the_file_where_the_format_cannot_have_them_free(tmp_path):
    import onnx

    x = torch.rand(2, 4) * 5
    assert autoprune.export(Wraps(), tmp_path / "small.pt2", x).dynamic == {"x": {0: "batch"}}
    written = autoprune.export(Wraps(), tmp_path / "small.onnx", x)
    assert written.dynamic == {}
    assert "all sizes are fixed, because otherwise Wraps cannot be exported to ONNX" in written.notes[0]
    (node,) = onnx.load(written.path).graph.input
    assert [dim.dim_value for dim in node.type.tensor_type.shape.dim] == [2, 4]
    assert torch.equal(run(written.path, x)[0], Wraps()(x))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_types_of_numbers_stay(ending, dtype, tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).to(dtype)
    written = autoprune.export(model, tmp_path / f"small{ending}", torch.randn(2, 4, dtype=dtype))
    assert run(written.path, torch.randn(3, 4, dtype=dtype))[0].dtype == dtype


def test_a_program_keeps_the_memory_format_and_the_names_of_weights(tmp_path):
    model = Images().to(memory_format=torch.channels_last)
    path = autoprune.export(model, tmp_path / "small.pt2", images(2)).path
    state = torch.export.load(path).state_dict
    assert state.keys() == model.state_dict().keys()
    assert state["body.0.weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@without_onnx
def test_bfloat16_is_for_programs_alone(tmp_path):
    model, x = nn.Linear(4, 3).bfloat16(), torch.randn(2, 4).bfloat16()
    with pytest.raises(UnsupportedModelError, match=r"bfloat16.*model\.float"):
        export(model, tmp_path / "small.onnx", x)
    assert export(model, tmp_path / "small.pt2", x).parity.absolute == 0


def test_the_format_is_named_by_the_ending_or_given(tmp_path):
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"format must be given.*ends in none of"):
        autoprune.export(layer, tmp_path / "small.bin", x)
    with pytest.raises(ValueError, match="format must be one of"):
        autoprune.export(layer, tmp_path / "small.bin", x, format="tflite")
    autoprune.export(layer, tmp_path / "small.bin", x, format="torch")
    assert torch.equal(torch.export.load(io.BytesIO((tmp_path / "small.bin").read_bytes())).module()(x), layer(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.1])
def test_a_value_that_differs_is_found_wherever_it_is(value):
    expected = torch.tensor([1.0, float("nan"), float("inf"), 0.0])
    calls = [Outputs("x", [expected])]
    assert compare(calls, [[expected.clone()]], "a", None).absolute == 0
    for place in range(4):
        found = expected.clone()
        if not torch.equal(found[place], torch.tensor(value)) and not (found[place].isnan() and value != value):
            found[place] = value
            with pytest.raises(UnsupportedModelError):
                compare(calls, [[found]], "a", None)


def test_whole_numbers_must_be_equal_whatever_the_tolerance():
    with pytest.raises(UnsupportedModelError, match="output 0 of a"):
        compare([Outputs("x", [torch.tensor([100000])])], [[torch.tensor([100001])]], "a", 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_transformer_with_uneven_layers_and_without_branches_is_exported(ending, tmp_path):
    small = uneven("LlamaForCausalLM", dropped=("model.layers.0.mlp", "model.layers.1.self_attn"))
    written = export(small, tmp_path / f"small{ending}", HF_ZOO["LlamaForCausalLM"].inputs())
    assert written.dynamic == {"input_ids": {0: "batch", 1: "sequence"}}
    ids = torch.arange(4, 25).reshape(3, 7)
    with torch.no_grad():
        expected = small(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(run(written.path, input_ids=ids)[0], expected, rtol=1e-4, atol=1e-5)
