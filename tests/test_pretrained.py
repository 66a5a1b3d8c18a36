"""Pruned models of transformers, written to a folder and loaded in a fresh process: equal to the last bit."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import autoprune
from autoprune.errors import FileFormatError, UnsupportedModelError
from autoprune.result.pretrained.layers import LayerWidths
from autoprune.result.pretrained.section import keep_in_config
from autoprune.result.pretrained.writing import pretrained_widths
from tests.uneven import answers, uneven
from zoo.hf import HF_ZOO

LLAMA = "LlamaForCausalLM"
SHALLOW = f"{LLAMA}-shallow"
DROPPED = ("model.layers.0.mlp", "model.layers.1.self_attn")
NAMES = [
    "BertForSequenceClassification",
    "GPT2LMHeadModel",
    LLAMA,
    "Qwen3ForCausalLM",
    "ViTForImageClassification",
    SHALLOW,
]


def kind_of(name):
    """The class of a model by its name here."""
    return name.partition("-")[0]


@pytest.fixture(scope="module")
def small():
    """Pruned models by name."""
    return {name: uneven(kind_of(name), dropped=DROPPED if name == SHALLOW else ()) for name in NAMES}


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """A folder for each model as autoprune exports it, one as it saves itself, and the answers of a fresh process."""
    folder = tmp_path_factory.mktemp("pretrained")
    for name, model in small.items():
        autoprune.export(model, folder / name, HF_ZOO[kind_of(name)].inputs(), format="hf")
        model.save_pretrained(folder / f"{name}-self")
    names = [each for name in NAMES for each in (name, f"{name}-self")]
    subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.uneven", folder, *names], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["", "-self"], ids=["export", "save_pretrained"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_gives_the_same_outputs_and_generates_the_same(name, writer, small, folder):
    dense = sum(p.numel() for p in HF_ZOO[kind_of(name)].build().parameters())
    assert sum(p.numel() for p in small[name].parameters()) < 0.9 * dense
    expected = answers(small[name], kind_of(name))
    found = load_file(folder / f"{name}{writer}.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor)


@pytest.mark.slow
def test_the_config_says_which_layers_differ_and_in_what(small, folder):
    config = json.loads((folder / LLAMA / "config.json").read_text())
    per_layer = config["per_layer_config"]
    for i, layer in enumerate(small[LLAMA].model.layers):
        own = {"intermediate_size": config["intermediate_size"], "num_key_value_heads": config["num_key_value_heads"]}
        own |= per_layer.get(str(i), {})
        assert own["intermediate_size"] == layer.mlp.gate_proj.weight.shape[0]
        assert own["num_key_value_heads"] * config["head_dim"] == layer.self_attn.k_proj.weight.shape[0]
    assert config["hidden_size"] == small[LLAMA].model.embed_tokens.weight.shape[1]
    assert per_layer


@pytest.mark.slow
def test_the_config_says_which_parts_were_left_out(folder):
    config = json.loads((folder / SHALLOW / "config.json").read_text())
    assert [config["per_layer_config"][str(i)]["skip"] for i in range(2)] == [["mlp"], ["attention"]]
    assert "mlp" not in str(autoprune.from_pretrained(folder / SHALLOW).model.layers[0].state_dict().keys())


@pytest.mark.slow
def test_transformers_reads_the_config_and_the_round_trip_gives_it_back(folder):
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(folder / LLAMA)
    written = json.loads((folder / LLAMA / "config.json").read_text())["per_layer_config"]
    assert {int(i): own for i, own in read.to_dict()["per_layer_config"].items()} == {
        int(i): own for i, own in written.items()
    }


@pytest.mark.slow
def test_equal_layers_are_loaded_by_transformers_itself(tmp_path):
    model = uneven(LLAMA, (0.5,))
    written = autoprune.export(model, tmp_path / "small", HF_ZOO[LLAMA].inputs(), format="hf")
    assert written.notes == ("LlamaForCausalLM.from_pretrained of transformers loads it, too",)
    stock = type(model).from_pretrained(tmp_path / "small", attn_implementation="sdpa").eval()
    assert torch.equal(answers(stock, LLAMA)["outputs"], answers(model, LLAMA)["outputs"])


@pytest.mark.slow
def test_a_loaded_model_is_saved_and_pruned_on(folder, tmp_path):
    loaded = autoprune.from_pretrained(folder / LLAMA)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())  # or kernels round otherwise
    autoprune.save(loaded, tmp_path / "small.safetensors")
    again = autoprune.load(tmp_path / "small.safetensors", HF_ZOO[LLAMA].build()).eval()
    assert torch.equal(answers(again, LLAMA)["outputs"], answers(loaded, LLAMA)["outputs"])
    again.save_pretrained(tmp_path / "again")
    last = autoprune.from_pretrained(tmp_path / "again")
    assert torch.equal(answers(last, LLAMA)["generated"], answers(loaded, LLAMA)["generated"])


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


@pytest.fixture
def copied(folder, tmp_path):
    shutil.copytree(folder / LLAMA, tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_pickle_in_the_place_of_a_file_is_refused_by_name(name, copied):
    (copied / name).write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(FileFormatError, match=name.replace(".", r"\.")):
        autoprune.from_pretrained(copied)


@pytest.mark.slow
def test_weights_that_are_a_pickle_are_never_looked_for(copied):
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(FileNotFoundError, match="pickles, which are never read"):
        autoprune.from_pretrained(copied)


def changed(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    section = fields.pop("section", {})
    config |= fields
    config["autoprune"] |= section
    (folder / "config.json").write_text(json.dumps(config))


CALLS_THE_SYSTEM = {"name": "x", "inputs": [], "nodes": [["os", "system"]], "output": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 9999}, "more layers than there are tensors"),
        ({"vocab_size": 10**9}, "model of .* MiB"),
        ({"architectures": ["os"]}, "'os', which is none of transformers"),
        ({"architectures": ["pipeline"]}, "'pipeline', which is none of transformers"),
        ({"architectures": ["BertModel"]}, "config.json cannot be used"),
        ({"section": {"dense": {"hidden_size": 10**7}}}, "model of .* MiB"),
        ({"section": {"dense": {"hidden_size": 16}}}, "which is not larger"),
        ({"section": {"attributes": {"model.layers.0": {"forward": 3}}}}, "no whole number"),
        ({"section": {"attributes": {"nothing": {"heads": 3}}}}, "nothing"),
        (
            {"section": {"graphs": {"model": {"name": "x", "inputs": [], "nodes": [["os", "system"]], "output": 0}}}},
            "cannot be used",
        ),
        ({"section": {"buffers": {"model.rotary_emb.inv_freq": {"0": [10**6]}}}}, "other entries"),
        ({"section": {"dropped": {"model.layers.0.mlp": {"call": "system"}}}}, "zeros or plain values"),
        ({"section": {"version": 2}}, "has version 2"),
        ({"section": {"types": {"model.rotary_emb.inv_freq": "load"}}}, "the type 'load'"),
    ],
)
def test_a_config_that_lies_is_refused_before_memory_is_taken(fields, told, copied):
    changed(copied, **fields)
    with pytest.raises(FileFormatError, match=told):
        autoprune.from_pretrained(copied)


@pytest.mark.slow
def test_an_index_of_weights_stays_in_its_folder(copied, tmp_path):
    weights = load_file(copied / "model.safetensors")
    first, *rest = weights
    save_file({first: weights[first]}, copied / "model-1.safetensors", {"format": "pt"})
    save_file({name: weights[name] for name in rest}, copied / "model-2.safetensors", {"format": "pt"})
    (copied / "model.safetensors").unlink()
    index = {"weight_map": {first: "model-1.safetensors", **dict.fromkeys(rest, "model-2.safetensors")}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert isinstance(autoprune.from_pretrained(copied), nn.Module)
    shutil.copy(copied / "model-1.safetensors", tmp_path / "outside.safetensors")
    index["weight_map"][first] = "../outside.safetensors"
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileFormatError, match="no safetensors file of its folder"):
        autoprune.from_pretrained(copied)


@pytest.mark.slow
def test_a_folder_without_pruning_and_other_models_are_refused_with_the_way_out(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    del config["autoprune"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match="load an ordinary model with from_pretrained of transformers"):
        autoprune.from_pretrained(copied)
    with pytest.raises(UnsupportedModelError, match="format='hf' is for models of transformers, got a Linear"):
        autoprune.export(nn.Linear(3, 2), tmp_path / "linear", torch.randn(2, 3), format="hf")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        autoprune.from_pretrained(tmp_path / "missing")


@pytest.mark.slow
def test_a_folder_keeps_other_files_and_an_export_that_fails_changes_nothing(small, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    autoprune.export(small[LLAMA], tmp_path, HF_ZOO[LLAMA].inputs(), format="hf")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() >= {"tokenizer.json", "config.json", "model.safetensors"}
    model = uneven(LLAMA, (0.5,))
    model.lm_head.register_forward_hook(lambda module, args, output: output + 1.0)  # which no file holds
    with pytest.raises(UnsupportedModelError, match="nothing was written"):
        autoprune.export(model, tmp_path, HF_ZOO[LLAMA].inputs(), format="hf")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class SavesItself(nn.Linear):
    """Saves itself with a config of another library."""

    config = {"width": 3}

    def save_pretrained(self, path):
        raise NotImplementedError


def test_a_config_of_another_library_is_warned_of_once(caplog):
    for _ in range(2):
        keep_in_config(SavesItself(3, 2), {}, SavesItself(3, 2))
        keep_in_config(nn.Linear(3, 2), {}, nn.Linear(3, 2))
    (record,) = caplog.records
    assert "SavesItself.save_pretrained would write the config of the dense model" in record.message


WIDTHS = LayerWidths(
    (
        {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64},
        {"num_attention_heads": 8, "num_key_value_heads": 4},
        {"intermediate_size": 32},
    ),
    ((), (), ("mlp",), ("attention",)),
)


class TestOtherForms:
    """The same widths as other tools write them, by hand and by round trip."""

    def test_model_optimizer_has_a_block_for_each_layer(self):
        blocks = WIDTHS.block_configs()
        assert blocks[1] == {
            "attention": {"no_op": False, "num_attention_heads": 4, "num_key_value_heads": 2},
            "ffn": {"no_op": False, "intermediate_size": 64},
        }
        assert blocks[2]["ffn"]["no_op"]
        assert LayerWidths.from_block_configs(json.loads(json.dumps(blocks))) == WIDTHS

    def test_llama_cpp_has_an_array_for_each_size(self):
        arrays = WIDTHS.gguf_arrays("llama")
        assert arrays == {
            "llama.attention.head_count": [8, 4, 8, 0],
            "llama.attention.head_count_kv": [4, 2, 4, 0],
            "llama.feed_forward_length": [96, 64, 0, 32],
        }
        assert LayerWidths.from_gguf_arrays(json.loads(json.dumps(arrays))) == WIDTHS

    def test_transformers_has_what_differs_from_the_config(self):
        dense = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}
        whole = LayerWidths(tuple({**dense, **layer} for layer in WIDTHS.layers), WIDTHS.skipped)
        found = whole.per_layer_config(dense)
        assert found == {
            1: {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64},
            2: {"skip": ["mlp"]},
            3: {"intermediate_size": 32, "skip": ["attention"]},
        }
        assert LayerWidths.from_per_layer_config(json.loads(json.dumps(found)), dense, 4) == whole

    def test_what_all_layers_have_in_common_is_a_plain_field(self):
        layers = (
            {"intermediate_size": 64, "num_key_value_heads": 2},
            {"intermediate_size": 64, "num_key_value_heads": 1},
        )
        widths = LayerWidths(layers, ((), ()))
        assert widths.plain() == {"intermediate_size": 64}
        assert widths.per_layer_config({"intermediate_size": 96, "num_key_value_heads": 2}) == {
            1: {"num_key_value_heads": 1}
        }

    @pytest.mark.slow
    def test_a_pruned_model_gives_all_of_them(self, small):
        widths = pretrained_widths(small[LLAMA]).layers
        for form in (
            widths.from_block_configs(widths.block_configs()),
            widths.from_gguf_arrays(widths.gguf_arrays("llama")),
        ):
            assert form == widths
        assert [block["ffn"]["intermediate_size"] for block in widths.block_configs()] == [
            layer.mlp.up_proj.weight.shape[0] for layer in small[LLAMA].model.layers
        ]
