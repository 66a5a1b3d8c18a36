"""`inspect`: figures against models built and counted, the text, and the page."""

import json
import re
import warnings
from html.parser import HTMLParser

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import autoprune
from autoprune.errors import UnsupportedModelError
from autoprune.inspection import Inspection, inspect
from autoprune.inspection.text import human
from autoprune.protocols import Pruning
from autoprune.search_spaces import Channels
from tests.small_networks import perceptron
from zoo import ZOO

NAMES = ("vgg_bn", "resnet20_padded", "densenet", "mobilenet_v2", "shufflenet_v2", "mlp", "tied_autoencoder")


@pytest.fixture(scope="module")
def inspections() -> dict[str, Inspection]:
    return {name: inspect(ZOO[name].build(), ZOO[name].inputs()) for name in NAMES}


def counted(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[float, int]:
    """MACs of one sample and parameters, found by PyTorch."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 2 / len(inputs[0]), sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_padded", "mobilenet_v2", "densenet"])
def test_shares_are_those_of_models_built_with_one_unit_left_where_the_space_allows_it(name):
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    found = inspect(model, inputs, space=Channels(step=1, min_fraction=1e-9))
    assert found.limits == ""
    macs, params = counted(model, inputs)
    assert (found.dense["flops"], found.dense["params"]) == (macs, params)
    for group in found.groups:
        less = counted(found.structure.build(model, Pruning({group.name: (0,)})), inputs)
        assert (group.flops_share, group.params_share) == pytest.approx((1 - less[0] / macs, 1 - less[1] / params))
    everything = Pruning({group.name: (0,) for group in found.groups})
    least = counted(found.structure.build(model, everything), inputs)
    removable = found.removable["flops"], found.removable["params"]
    assert removable == pytest.approx((1 - least[0] / macs, 1 - least[1] / params))


@pytest.mark.slow
@pytest.mark.parametrize(
    "space", [Channels(), Channels(min_fraction=0.25, round_to=4), Channels(bounds={"0.0": (0.5, 1)})]
)
def test_what_is_removable_is_what_a_search_with_the_same_space_reaches(space):
    model, inputs = perceptron(hidden=64), torch.randn(2, 4)
    found = inspect(nn.Sequential(model, nn.ReLU(), nn.Linear(3, 2)), inputs, space=space)
    with pytest.raises(autoprune.InfeasibleBudgetError) as raised:
        autoprune.search(nn.Sequential(model, nn.ReLU(), nn.Linear(3, 2)), "flops <= 0.1%", space=space, example=inputs)
    cheapest = int(re.search(r"at least (\d+), the cheapest reachable", str(raised.value)).group(1))
    assert found.removable["flops"] == pytest.approx(1 - cheapest / found.dense["flops"])
    (settings,) = re.findall(r"what stops there is (.*) of Channels", str(raised.value))
    assert f"by {settings} of Channels(...)" in found.limits
    assert found.to_dict()["limits"] == found.limits
    assert settings in " ".join(str(found).split())


def test_a_space_without_a_choice_leaves_nothing_removable():
    found = inspect(perceptron(), torch.randn(2, 4), space=Channels(ignore=["*"]))
    assert set(found.removable.values()) == {0.0}
    assert found.groups


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_group_reaches_more_than_all_and_all_reach_no_more_than_the_sum(name, inspections):
    found = inspections[name]
    for cost in ("flops", "params"):
        shares = [getattr(group, f"{cost}_share") for group in found.groups]
        assert 0 < max(shares) <= found.removable[cost] < 1
        assert found.removable[cost] <= sum(shares) + 1e-12
    assert 0 < found.removable["memory_bytes"] < 1


@pytest.mark.slow
def test_memory_is_stated_for_one_sample_whatever_the_batch():
    model = perceptron()
    parameters = sum(p.numel() for p in model.parameters())
    figures = [inspect(model, torch.ones(batch, 4)).dense["memory_bytes"] for batch in (2, 16)]
    assert figures[0] == figures[1] == 4 * (parameters + 4 + 8 + 8)  # the input, then before and after the ReLU


@pytest.mark.parametrize("name", NAMES)
def test_the_text_fits_a_hundred_columns_and_names_each_group_with_its_units(name, inspections):
    text = str(inspections[name])
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii()
    for group in inspections[name].groups:
        assert re.search(rf"^  {re.escape(group.name)} +{group.units} +{group.layers} ", text, re.MULTILINE)


def test_layers_are_the_modules_that_shrink_with_a_group():
    bare = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)).eval()
    (group,) = inspect(bare, torch.ones(2, 3, 8, 8)).groups
    assert (group.name, group.units, group.layers) == ("0", 8, 3)


def test_frozen_parts_come_by_reason_largest_first_with_the_share_they_involve():
    found = inspect(perceptron(inputs=40), torch.ones(2, 40))
    reads, returns = found.frozen
    total = 40 * 8 + 8 + 8 * 3 + 3
    assert "reads the model's input" in reads.reason
    assert (reads.tensors, reads.params_share) == (("0.weight",), pytest.approx(320 / total))
    assert (returns.reason, returns.tensors) == ("returned by the model", ("2.weight", "2.bias"))
    assert returns.params_share == pytest.approx(27 / total)
    assert "Call(outputs=...) or Call(forward=...)" in returns.remedy
    text = str(found)
    assert text.index(reads.reason) < text.index(returns.reason)
    assert returns.remedy in " ".join(text.split())


def test_a_parameter_frozen_in_two_dimensions_counts_once():
    (returns, reads) = inspect(nn.Linear(4, 3), torch.ones(2, 4)).frozen
    assert (returns.params_share, reads.params_share) == (1.0, 0.8)

    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + self.weight.sum(), self.weight

    (part,) = inspect(Gram(), torch.ones(2, 4)).frozen
    assert part.params_share == 1.0


def test_only_the_three_largest_reasons_are_spelled_out(inspections):
    found = inspections["resnet20_padded"]
    assert len(found.frozen) == 4
    text = " ".join(str(found).split())
    assert all(part.reason in text for part in found.frozen[:3])
    assert found.frozen[3].reason not in text
    assert "... and 1 more reason: see .frozen" in text


@pytest.mark.slow
def test_a_long_list_of_groups_is_cut_short_in_the_text_only():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(43)])
    found = inspect(model, torch.ones(2, 4))
    assert len(found.groups) == len(found.to_dict()["groups"]) == 42
    text = str(found)
    assert "... and 2 more" in text
    assert "\n  39 " in text
    assert "\n  40 " not in text


def test_a_name_too_long_for_the_table_keeps_both_ends():
    inner = nn.Sequential()
    inner.add_module("first_" + "x" * 90 + "_last", nn.Linear(4, 4))
    inner.add_module("head", nn.Linear(4, 3))
    text = str(inspect(inner, torch.ones(2, 4)))
    assert re.search(r"first_x+\.\.\.x+_last", text)
    assert max(map(len, text.splitlines()[:9])) <= 100


@pytest.mark.parametrize(
    ("model", "why"), [(nn.Linear(4, 3), "returned by the model: weight, bias"), (nn.ReLU(), "has no parameters")]
)
def test_a_model_with_nothing_to_prune_is_told_why(model, why):
    found = inspect(model, torch.ones(2, 4))
    assert found.groups == ()
    assert found.removable == {"flops": 0, "params": 0, "memory_bytes": 0}
    assert f"{type(model).__name__}: nothing can be pruned" in str(found)
    assert why in str(found)


def test_forward_leaves_out_what_does_not_matter():
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.unused = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.body(x).relu()
            return self.head(hidden), hidden

    leaky = inspect(Leaky(), torch.ones(2, 4))
    assert not leaky.groups
    assert leaky.untouched == {"unused.weight": 25, "unused.bias": 5}
    assert "30 params that the forward pass did not read: unused.weight, unused.bias" in str(leaky)
    freed = inspect(Leaky(), autoprune.Call(inputs=torch.ones(2, 4), forward=lambda model, x: model(x)[0]))
    assert [group.name for group in freed.groups] == ["body"]


def test_a_trace_on_real_values_is_mentioned(inspections):
    class Reads(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if x.sum().item() > 0 else 1)

    found = inspect(Reads(*perceptron()), torch.ones(2, 4))
    assert found.to_dict()["traced_on"] == "cpu"
    assert "real values (cpu)" in str(found)
    # at most the input, both sides of a layer and the number that is read, in 32-bit floats
    assert 2 * 4 * 4 <= found.to_dict()["trace_bytes"] <= 2 * (4 + 8 + 8 + 5) * 4 + 8
    assert inspections["mlp"].to_dict()["trace_bytes"] == 0
    assert "real values" not in str(inspections["mlp"])


@pytest.mark.parametrize("name", NAMES)
def test_the_dictionary_survives_json(name, inspections):
    data = inspections[name].to_dict()
    assert json.loads(json.dumps(data)) == data
    assert [group["name"] for group in data["groups"]] == [group.name for group in inspections[name].structure.groups]
    assert {part["reason"] for part in data["frozen"]} == {part.reason for part in inspections[name].structure.frozen}


@pytest.mark.slow
def test_the_model_and_the_random_states_stay_and_nothing_is_printed(global_rng_untouched, capfd):
    model = ZOO["vgg_bn"].build().train()
    model[0].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with global_rng_untouched():
        str(inspect(model, ZOO["vgg_bn"].inputs()))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training
    assert not model[0].weight.requires_grad
    assert model[1].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (12, "12"), (999, "999"), (1000, "1.00k"), (2_581_000, "2.58M"), (68_786, "68.8k"), (999_600, "1.00M")],
)
def test_numbers_are_written_with_three_digits(number, text):
    assert human(number) == text


def test_errors_of_the_analysis_pass_through():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, refusing it is not
        scripted = torch.jit.script(nn.Linear(4, 3))
    with pytest.raises(UnsupportedModelError, match="ScriptModule"):
        inspect(scripted, torch.ones(2, 4))
    with pytest.raises(ValueError, match="checks must be"):
        inspect(perceptron(), autoprune.Call(inputs=torch.ones(2, 4), checks="off"))


class Heads(nn.Module):
    """Attention of four heads of two channels that writes its sizes out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.num_heads, self.size = nn.Linear(5, 24), nn.Linear(8, 5), 4, 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.size).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-2, -1) / self.size**0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], self.num_heads * self.size))


@pytest.mark.slow
def test_sizes_that_follow_are_reported_by_name():
    torch.manual_seed(0)
    found = inspect(nn.Sequential(nn.Linear(3, 5), Heads(), nn.Linear(5, 2)), torch.randn(2, 3, 3))
    assert found.attributes == ("1.num_heads",)
    assert found.to_dict()["attributes"] == ["1.num_heads"]
    sentence = "Sizes kept in Python that follow the units: 1.num_heads."
    assert sentence in str(found)
    assert sentence in found.to_html()
    assert inspect(perceptron(), torch.ones(2, 4)).attributes == ()


class Page(HTMLParser):
    """Tags, the text of the cells and whatever a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [name for name, _ in attrs if name in ("src", "href", "srcset", "data") or name.startswith("on")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_whole_loads_nothing_and_names_every_group_and_reason(name, inspections, tmp_path):
    found = inspections[name]
    text = found.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text == found.to_html()
    page = Page(text)
    assert page.loads == []
    assert "url(" not in text
    assert "script" not in text
    for group in found.groups:
        assert group.name in page.text
    for part in found.frozen:
        assert part.reason in page.text
        assert part.remedy in page.text


def test_names_that_look_like_html_are_shown_as_they_are():
    model = nn.Sequential()
    model.add_module("<script>alert(1)</script>&'", nn.Linear(4, 8))
    model.add_module("head", nn.Linear(8, 3))
    text = inspect(model, torch.ones(2, 4)).to_html()
    assert "<script>" not in text
    assert "<script>alert(1)</script>&'" in Page(text).text


def test_the_page_of_a_model_with_nothing_to_prune_says_so():
    text = inspect(nn.ReLU(), torch.ones(2, 4)).to_html()
    assert "nothing can be pruned" in Page(text).text
    assert "has no parameters" in Page(text).text
