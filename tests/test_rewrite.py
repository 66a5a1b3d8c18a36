"""Modules whose code does not follow the widths are delivered as graphs of what they ran."""

import copy
import io
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoprune
from autoprune.protocols import Pruning
from autoprune.result.recipe import ATTRIBUTE, attach
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.rewriting.graph_module import RecordedModule, is_method
from autoprune.structure.slicing.skeleton import skeleton
from autoprune.structure.slicing.slicing import Edit, build
from tests.candidates import gap, oracle_outputs, outputs_of, random_pruning, state_of

WIDTH, HEADS = 16, 4


class Attention(nn.Module):
    """The attention of most ViT code: the size of a head and the shape of the output come from the input's shape."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj, self.drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return self.drop(self.proj((weights @ v).transpose(1, 2).reshape(b, n, c)))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, width: int = WIDTH):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(width), attention, nn.Linear(width, width)

    def forward(self, x: Tensor, *args: object) -> Tensor:
        x = x + self.attention(self.norm(x), *args)
        return x + self.mlp(x).relu()


def network(*blocks: nn.Module, width: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), *blocks, nn.Linear(width, 5)).eval().double()


def tokens(batch: int = 2, length: int = 9) -> tuple[Tensor]:
    return (torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(batch)).double(),)


def pruned(model: nn.Module, args: tuple, seed: int = 0, **settings) -> tuple[nn.Module, object, Pruning]:
    structure = analyse(Example(model, args), **settings)
    pruning = random_pruning(structure, np.random.default_rng(seed))
    return structure.build(model, pruning), structure, pruning


def assert_follows(model: nn.Module, args: tuple, *others: tuple, graphs: set[str], units: int | None = None) -> None:
    """Random prunings are right for the inputs that were traced and for others, and all of it trains."""
    structure = analyse(Example(model, args))
    assert set(structure.graphs) == graphs
    if units is not None:
        assert sum(group.size for group in structure.groups) == units
    rng = np.random.default_rng(0)
    for _ in range(3):
        pruning = random_pruning(structure, rng)
        built = structure.build(model, pruning)
        assert built.state_dict().keys() == model.state_dict().keys()
        for inputs in (args, *others):
            expected = oracle_outputs(model, structure.edit(pruning), inputs)
            assert gap(outputs_of(built, inputs), expected) <= 1e-9 * max(out.abs().max().item() for out in expected)
        sum(out.sum() for out in [built.train()(*args)]).backward()
        assert all(parameter.grad is not None for parameter in built.parameters())


class Cached(Attention):
    def forward(self, x: Tensor, past_key_values: list[Tensor] | None = None) -> Tensor:
        if past_key_values is not None:
            past_key_values.append(x)
        return super().forward(x)


class Language(nn.Module):
    """A model in the manner of transformers: it makes a cache of keys and values unless its config says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.generation_config = SimpleNamespace(use_cache=True), SimpleNamespace(use_cache=True)
        self.enter, self.attention, self.leave = nn.Linear(6, WIDTH), Cached(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, use_cache: bool | None = None) -> Tensor:
        past = [] if (self.config.use_cache if use_cache is None else use_cache) else None
        x = self.enter(x)
        return self.leave(x + self.attention(x, past_key_values=past))


@pytest.mark.parametrize("rewrite", ["auto", "off"])
def test_a_model_with_recorded_modules_keeps_no_cache_that_they_did_not_see(rewrite):
    model = Language().eval()
    example = Example(model, (tokens()[0].float(),), {"use_cache": False})
    structure = analyse(example, rewrite=rewrite)
    built = structure.build(model, random_pruning(structure, np.random.default_rng(0)))
    assert (set(structure.graphs) == {"attention"}) == (rewrite == "auto")
    assert built.config.use_cache == built.generation_config.use_cache == (rewrite == "off")
    assert model.config.use_cache
    assert torch.equal(built(tokens()[0].float()), built(tokens()[0].float(), use_cache=False))


class TestAttentionThatTiesHeadsToItsInput:
    @pytest.mark.slow
    def test_heads_and_residual_channels_are_free_of_each_other(self):
        structure = analyse(Example(network(Block(Attention()), Block(Attention())), tokens()))
        sizes = {group.name: group.size for group in structure.groups}
        assert (
            sizes == {"0": 16, "1.attention.qkv": 4, "1.mlp": 16, "2.attention.qkv": 4}
            or sum(sizes.values()) == 16 + 4 + 4
        )
        assert set(structure.graphs) == {"1.attention", "2.attention"}

    @pytest.mark.slow
    def test_what_is_built_is_right_at_other_batch_and_sequence_sizes(self):
        model = network(Block(Attention()), Block(Attention()))
        assert_follows(model, tokens(), tokens(3), tokens(1, 4), graphs={"1.attention", "2.attention"})

    @pytest.mark.slow
    def test_without_rewriting_they_are_tied_or_stay(self):
        structure = analyse(Example(network(Block(Attention())), tokens()), rewrite="off")
        assert not structure.graphs

    @pytest.mark.slow
    def test_the_dense_model_is_the_users_own(self):
        model = network(Block(Attention()))
        before = state_of(model)
        structure = analyse(Example(model, tokens()))
        built = structure.build(model, Pruning())
        assert type(built[1].attention) is Attention
        assert torch.equal(built(*tokens()), model(*tokens()))
        assert state_of(model) == before

    def test_a_setting_that_does_not_exist_is_refused(self):
        with pytest.raises(ValueError, match=r"rewrite must be one of \['auto', 'off'\], got 'on'"):
            analyse(Example(network(), tokens()), rewrite="on")


class Masked(nn.Module):
    """Hands its attention a mask, as decoders do while they read more than one token."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attention, self.leave = nn.Linear(6, WIDTH), Attention(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[:2], device=x.device) if x.shape[1] > 1 else None
        x = self.enter(x)
        return self.leave(x + self.attention(x, mask))


def test_an_argument_that_is_left_out_later_is_named():
    model = Masked().eval()
    built, structure, _ = pruned(model, (tokens()[0].float(),))
    assert set(structure.graphs) == {"attention"}
    with pytest.raises(ValueError, match=r"mask must be a tensor, as in the example inputs, got None; .* both kinds"):
        built(tokens(length=1)[0].float())
    x, one = tokens()[0].float(), tokens(length=1)[0].float()
    both = autoprune.inspect(model, [x, one]).structure
    assert not both.graphs
    both.build(model, random_pruning(both, np.random.default_rng(0)))(one)


@pytest.fixture(scope="module")
def original():
    model = network(Block(Attention(dropout=0.5)))
    built, structure, pruning = pruned(model, tokens())
    return attach(built, structure.edit(pruning), model)


@pytest.fixture
def built(original):
    return copy.deepcopy(original).eval()


class TestWhatIsDelivered:
    @pytest.mark.slow
    def test_is_a_graph_of_the_same_name(self, built):
        attention = built[1].attention
        assert isinstance(attention, torch.fx.GraphModule)
        assert type(attention).__name__ == "Attention"
        assert attention.heads == HEADS

    def test_drops_out_in_training_only(self, built):
        first, second = (built.train()(*tokens()) for _ in range(2))
        assert not torch.equal(first, second)
        built[1].attention.drop.p = 0.0  # leaves the function in the forward
        first, second = (built.train()(*tokens()) for _ in range(2))
        assert not torch.equal(first, second)
        assert torch.equal(built.eval()(*tokens()), built(*tokens()))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"])
    def test_is_copied_with_its_weights(self, built, copied):
        twin = copied(built)
        assert torch.equal(twin(*tokens()), built(*tokens()))
        assert list(twin.state_dict()) == list(built.state_dict())
        with torch.no_grad():
            twin[1].attention.proj.weight.zero_()
        assert not torch.equal(twin(*tokens()), built(*tokens()))

    def test_is_saved_by_torch(self, built):
        buffer = io.BytesIO()
        torch.save(built, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded(*tokens()), built(*tokens()))

    @pytest.mark.slow
    def test_is_exported_with_a_free_batch_size(self, built):
        sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
        program = torch.export.export(built, tokens(), dynamic_shapes=(sizes,)).module()
        assert torch.allclose(program(*tokens(5, 7)), built(*tokens(5, 7)))

    @pytest.mark.slow
    def test_follows_further_pruning_by_itself(self, built):
        again, structure, pruning = pruned(built, tokens(), seed=1)
        assert not structure.graphs
        expected = oracle_outputs(built, structure.edit(pruning), tokens())
        assert gap(outputs_of(again, tokens()), expected) < 1e-9

    def test_follows_its_users_half_precision(self, built):
        half = built.to(torch.bfloat16)
        assert half(tokens()[0].to(torch.bfloat16)).dtype == torch.bfloat16


class TestCopies:
    @pytest.mark.slow
    def test_share_the_compiled_forward_until_one_is_changed(self, built):
        before = built(*tokens())
        lent = skeleton(built)[1].attention
        assert type(lent) is type(built[1].attention)
        assert lent.graph is built[1].attention.graph
        zeros = torch.fx.Graph()
        x = zeros.placeholder("x")
        zeros.output(zeros.call_function(torch.zeros_like, (x,)))
        lent.graph = zeros
        assert not lent(torch.ones(2, 3)).any()
        assert torch.equal(built(*tokens()), before)

    def test_that_are_delivered_share_nothing(self, built):
        other = build(built, Edit({}, {}))[1].attention
        assert type(other) is not type(built[1].attention)
        assert other.graph is not built[1].attention.graph
        assert torch.equal(build(built, Edit({}, {}))(*tokens()), built(*tokens()))


class TestRecipes:
    @pytest.mark.slow
    def test_a_fresh_model_of_the_users_class_becomes_the_pruned_one(self, built, tmp_path):
        autoprune.save(built, tmp_path / "small.safetensors")
        fresh = network(Block(Attention()))
        loaded = autoprune.load(tmp_path / "small.safetensors", fresh)
        assert torch.equal(loaded(*tokens(3, 5)), built(*tokens(3, 5)))
        assert isinstance(loaded[1].attention, RecordedModule)
        assert type(fresh[1].attention) is Attention

    @pytest.mark.parametrize(
        "node",
        [
            ["function", "torch.load", ["x"], {"dict": []}],
            ["function", "os.system", ["true"], {"dict": []}],
            ["method", "__reduce_ex__", [{"node": 0}], {"dict": []}],
            ["method", "numpy", [{"node": 0}], {"dict": []}],
            ["operator", "attrgetter", ["x"], {"dict": []}],
            ["property", "__class__", [{"node": 0}], {"dict": []}],
            ["call", "x", [], {"dict": []}],
            ["state", "proj; import os", [], {"dict": []}],
            ["module", "proj.__class__", [], {"dict": []}],
            ["function", "torch.relu", [{"node": 0}], {"dict": [["inplace=print(1) or", 0]]}],
            ["function", "torch.relu", [{"unknown": 0}], {"dict": []}],
        ],
        ids=lambda node: str(node[1]),
    )
    def test_a_recipe_calls_functions_on_tensors_and_nothing_else(self, built, tmp_path, node):
        recipe = json.loads(json.dumps(getattr(built, ATTRIBUTE)))
        recipe["graphs"]["1.attention"]["nodes"].insert(0, node)
        setattr(built, ATTRIBUTE, recipe)
        autoprune.save(built, tmp_path / "evil.safetensors")
        with pytest.raises(autoprune.FileFormatError, match="was not made for this Sequential: a description"):
            autoprune.load(tmp_path / "evil.safetensors", network(Block(Attention())))

    def test_methods_that_leave_tensors_are_known(self):
        assert is_method("reshape")
        assert not is_method("__reduce_ex__")
        assert not is_method("share_memory_")


class Windows(nn.Module):
    """Attention in windows of a map that is rolled, with a table of relative positions and a mask, as in Swin."""

    def __init__(self, width: int = WIDTH, heads: int = 2, window: int = 2):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None, :] + window - 1).permute(1, 2, 0)
        self.register_buffer("index", apart[..., 0] * (2 * window - 1) + apart[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        side, w = int(n**0.5), self.window
        x = torch.roll(x.view(b, side, side, c), (-1, -1), (1, 2))
        x = x.view(b, side // w, w, side // w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, c)
        q, k, v = self.qkv(x).reshape(-1, w * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(w * w, w * w, -1).permute(2, 0, 1)
        mask = torch.zeros(side // w * (side // w), w * w, w * w, device=x.device, dtype=x.dtype)
        mask[-1, 0, 1:] = -100.0
        scores = q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5 + bias[None]
        scores = scores.view(b, -1, self.heads, w * w, w * w) + mask[None, :, None]
        x = (scores.view(-1, self.heads, w * w, w * w).softmax(-1) @ v).transpose(1, 2).reshape(-1, w * w, c)
        x = x.view(b, side // w, side // w, w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(b, side, side, c)
        return self.proj(torch.roll(x, (1, 1), (1, 2)).view(b, n, c))


class ClassToken(nn.Module):
    """Class attention: one token asks all, and is put in front of the others."""

    def __init__(self, width: int = WIDTH, heads: int = 4):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1)
        b, n, c = x.shape
        q = self.q(x[:, 0]).unsqueeze(1).reshape(b, 1, self.heads, c // self.heads).permute(0, 2, 1, 3)
        k, v = (f(x).reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3) for f in (self.k, self.v))
        out = F.scaled_dot_product_attention(q * self.scale, k, v, scale=1.0)
        return torch.cat((self.proj(out.transpose(1, 2).reshape(b, 1, c)), x[:, 2:]), dim=1)


class Reduced(nn.Module):
    """Keys and values from a map that a convolution makes smaller, whose sizes the caller says, as in PVT."""

    def __init__(self, width: int = WIDTH, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.reduce = nn.Conv2d(width, width, 2, 2)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3)
        small = self.reduce(x.permute(0, 2, 1).reshape(b, c, height, width)).reshape(b, c, -1).permute(0, 2, 1)
        k, v = self.kv(small).reshape(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(c // self.heads)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Pixels(nn.Module):
    """A map of tokens for modules that are told its sizes."""

    def __init__(self, inner: nn.Module, width: int = WIDTH):
        super().__init__()
        self.stem, self.norm, self.inner, self.head = (
            nn.Conv2d(3, width, 2, 2),
            nn.LayerNorm(width),
            inner,
            nn.Linear(width, 5),
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        x = x + self.inner(self.norm(x), height, width)
        return self.head(x.mean(1))


def image(batch: int, height: int, width: int) -> tuple[Tensor]:
    return (torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).double(),)


class TestKindsOfAttention:
    @pytest.mark.slow
    def test_windows_of_a_rolled_map_with_a_mask_at_other_batch_sizes(self):
        assert_follows(network(Block(Windows())), tokens(2, 16), tokens(3, 16), graphs={"1.attention"})

    @pytest.mark.slow
    def test_a_class_token(self):
        assert_follows(network(Block(ClassToken())), tokens(), tokens(3, 4), graphs={"1.attention"})

    @pytest.mark.slow
    def test_keys_from_a_map_whose_sizes_are_numbers(self):
        torch.manual_seed(0)
        model = Pixels(Reduced()).eval().double()
        assert_follows(model, image(2, 8, 8), image(3, 12, 8), image(1, 8, 16), graphs={"inner"})


@pytest.mark.slow
def test_an_inspection_names_what_is_delivered_as_a_graph():
    model = network(Block(Attention()))
    found = autoprune.inspect(model, tokens())
    assert found.graphs == ("1.attention",)
    assert found.to_dict()["graphs"] == ["1.attention"]
    assert "delivered as graphs of what they ran: 1.attention" in " ".join(str(found).split())
    assert autoprune.inspect(model, autoprune.Call(inputs=tokens(), rewrite="off")).graphs == ()


@pytest.mark.slow
def test_a_search_scores_what_it_delivers_and_says_so(tmp_path):
    torch.manual_seed(0)
    model = Pixels(Reduced()).eval()
    x, y = torch.randn(96, 3, 8, 8), torch.randint(5, (96,))
    data = torch.utils.data.TensorDataset(x, y)
    result = autoprune.search(model, "flops <= 70%", data, trials=4)
    assert any("delivered as graphs: Reduced ('inner')" in note for note in result.notes)
    trial = min(result.front, key=lambda trial: trial.costs["flops"])
    built = result.build(trial)
    assert isinstance(built.inner, RecordedModule)
    autoprune.save(built, tmp_path / "small.safetensors")
    assert torch.equal(autoprune.load(tmp_path / "small.safetensors", model)(x), built(x))
    result.save(tmp_path / "result")
    again = autoprune.SearchResult.load(tmp_path / "result", model)
    assert torch.equal(again.build(again.front[0])(x), result.build(result.front[0])(x))
