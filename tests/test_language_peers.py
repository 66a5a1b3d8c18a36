"""Published methods of pruning language models, as re-implemented for comparison: each does what its paper defines."""

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F

from benchmarks.peers.language import depth, evopress, flap, multipruner, replaceme, slicegpt, surgeon, taylor, ziplm
from benchmarks.peers.language.__main__ import cells
from benchmarks.peers.language.blocks import attended, embedded, fed, layers_of, mean_loss, parameters
from benchmarks.peers.language.case import Case
from benchmarks.peers.language.levels import Scorer, Stitched, next_token
from benchmarks.peers.language.methods import METHODS, OURS, OURS_WRITTEN, PEERS
from benchmarks.peers.language.obs import Layer, refitted, removal_order
from benchmarks.peers.language.ours import SPACES
from benchmarks.peers.language.report import report

transformers = pytest.importorskip("transformers")

LAYERS, WIDTH, MLP, GROUPS, HEADS, SIZE = 4, 48, 128, 3, 6, 8


@pytest.fixture(scope="module")
def case():
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=SIZE,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).double().eval()
        for layer in layers_of(model):
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.data.uniform_(0.5, 1.5)
        ids = torch.randint(0, 101, (24, 20))
    return Case(model, ids, seed=0, evaluations=6, dtype=torch.float64)


@pytest.fixture(scope="module")
def streams(case):
    """The hidden states before each block and after the last, as the library reports them."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers_of(case.model)
    ] + [case.model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    with torch.no_grad():
        case.model(input_ids=case.ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture(scope="module")
def layer():
    """Inputs of a linear layer, (200, 12), and the layer."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ mixed
    return x, Layer(torch.randn(7, 12, generator=generator, dtype=torch.float64), x.T @ x / 200, 1)


@pytest.fixture(scope="module")
def stitched(case):
    return Stitched(case, surgeon.surgeon_of(case, 1e-2))


def inputs_of(case, name):
    """Inputs of the linear layer of this name in every block, one matrix of all tokens each."""
    seen = []
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        for layer in layers_of(case.model)
    ]
    with torch.no_grad():
        case.model(input_ids=case.ids)
    for hook in hooks:
        hook.remove()
    return seen


def kept_blocks(network, case):
    """Which blocks of the dense model are left, by their first matrix."""
    dense = [layer.self_attn.q_proj.weight for layer in case.layers]
    return [
        next(i for i, w in enumerate(dense) if torch.equal(w, b.self_attn.q_proj.weight)) for b in layers_of(network)
    ]


@pytest.mark.parametrize(
    ("method", "variant"), [(name, variant) for name, variants in PEERS.items() for variant in variants]
)
def test_networks_have_at_most_the_parameters_asked_for_and_run(case, method, variant):
    before = copy.deepcopy(case.model.state_dict())
    network = PEERS[method][variant](case, 0.74)
    counted = sum(
        p.numel() for name, p in network.named_parameters() if "embed_tokens" not in name and "lm_head" not in name
    )
    dense = sum(p.numel() for name, p in case.model.named_parameters() if "embed_tokens" not in name)
    assert 0.4 * dense < counted <= 0.7405 * dense
    assert counted == parameters(network)
    assert network(input_ids=case.ids[:2], use_cache=False).logits.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())


def test_blocks_run_one_at_a_time_give_what_the_model_gives(case, streams):
    x, call = embedded(case.model, case.ids)
    for layer in case.layers:
        x = fed(layer, attended(layer, x, call))
    torch.testing.assert_close(x, streams[-1])


def test_the_loss_is_that_of_the_library(case):
    with torch.no_grad():
        losses = [float(case.model(input_ids=row[None], labels=row[None]).loss) for row in case.ids]
    assert mean_loss(case.model, case.ids) == pytest.approx(sum(losses) / len(losses))


class TestDepth:
    def test_block_influence_is_one_minus_the_mean_cosine_over_all_tokens(self, case, streams):
        expected = [
            1
            - sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True))
            / case.ids.numel()
            for x, y in itertools.pairwise(streams)
        ]
        found = depth.influences(case.statistics.cosines)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
        kept = kept_blocks(depth.short_gpt(case, 0.5), case)
        assert kept == sorted(sorted(range(LAYERS), key=expected.__getitem__)[2:])

    @pytest.mark.parametrize("blocks", [1, 2])
    def test_angular_distance_is_taken_at_the_last_token_across_the_run(self, case, streams, blocks):
        ends = [x[:, -1] for x in streams]
        expected = [
            float(torch.acos(F.cosine_similarity(ends[i], ends[i + blocks], dim=1)).mean() / torch.pi)
            for i in range(LAYERS - blocks + 1)
        ]
        found = depth.distances(case.statistics.angles, blocks)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)
        first = expected.index(min(expected))
        kept = kept_blocks(depth.angular(case, 1 - blocks / LAYERS, last_token=True), case)
        assert kept == [i for i in range(LAYERS) if not first <= i < first + blocks]

    @pytest.mark.parametrize(("spared", "expected"), [(0, [0, 1]), (1, [0, 3])])
    def test_the_last_blocks_go(self, case, spared, expected):
        assert kept_blocks(depth.last_blocks(case, 0.5, spared), case) == expected

    def test_what_is_left_generates_with_a_cache(self, case):
        network = depth.last_blocks(case, 0.5, 1)
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        with_cache = network.generate(case.ids[:1], use_cache=True, **settings)
        assert torch.equal(with_cache, network.generate(case.ids[:1], use_cache=False, **settings))


class TestReplaceMe:
    def test_the_map_solves_least_squares_on_the_tokens_themselves(self, case, streams):
        before = replaceme.best_cut(case.statistics.cosines, 2)
        network = replaceme.replace_me(case, 0.5, ridge=0.0)
        assert kept_blocks(network, case) == [i for i in range(LAYERS) if not before < i <= before + 2]
        x, call = embedded(case.model, case.ids)
        x = streams[before]
        y = attended(case.layers[before], x, call).detach()
        m = (streams[before + 1] - y).flatten(0, 1)
        target = (streams[before + 3] - y).flatten(0, 1)
        fitted = torch.linalg.lstsq(m, target).solution
        down = case.layers[before].mlp.down_proj.weight
        found = layers_of(network)[before].mlp.down_proj.weight
        torch.testing.assert_close(found, fitted.T @ down, rtol=1e-3, atol=1e-3)

    def test_a_run_that_is_linear_in_what_comes_before_it_is_replaced_without_loss(self, case):
        linear = Case(copy.deepcopy(case.model), case.ids, dtype=torch.float64)
        for layer in layers_of(linear.model)[1:3]:
            layer.self_attn.o_proj.weight.data.zero_()
            layer.mlp.down_proj.weight.data.zero_()
        network = replaceme.replace_me(linear, 0.5, ridge=0.0)
        out, expected = (net(input_ids=case.ids).logits for net in (network, linear.model))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


class TestFlap:
    def test_fluctuation_is_the_sample_variance_times_the_squared_norm_of_the_column(self, case):
        inputs = inputs_of(case, "mlp.down_proj")[1]
        weight = case.layers[1].mlp.down_proj.weight.detach()
        expected = [inputs[:, j].var() * (weight[:, j] ** 2).sum() for j in range(MLP)]
        found = flap.fluctuation(case.statistics.neurons[1], weight)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-6)

    def test_units_go_by_one_threshold_on_scores_standardised_in_each_layer(self, case):
        scores = torch.stack(
            [
                x.var(0) * layer.mlp.down_proj.weight.detach().square().sum(0)
                for x, layer in zip(inputs_of(case, "mlp.down_proj"), case.layers, strict=True)
            ]
        )
        scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
        network = flap.flap(case, 0.74, squared=False)
        kept = [layer.mlp.gate_proj.weight for layer in layers_of(network)]
        left, gone = [], []
        for i, layer in enumerate(case.layers):
            for j, row in enumerate(layer.mlp.gate_proj.weight):
                (left if (kept[i] == row).all(1).any() else gone).append(float(scores[i, j]))
        assert 0 < len(gone) < LAYERS * MLP
        assert max(gone) <= min(left) + 1e-4

    def test_biases_carry_the_mean_of_what_went(self, case):
        network = flap.flap(case, 0.74, squared=False)
        inputs = inputs_of(case, "mlp.down_proj")
        for i, layer in enumerate(layers_of(network)):
            dense = case.layers[i].mlp
            stays = torch.stack([(layer.mlp.gate_proj.weight == row).all(1).any() for row in dense.gate_proj.weight])
            mean = torch.where(stays, 0.0, inputs[i].mean(0))
            expected = dense.down_proj.weight.detach() @ mean
            torch.testing.assert_close(layer.mlp.down_proj.bias.detach(), expected, rtol=1e-4, atol=1e-5)


class TestSliceGpt:
    def test_nothing_changes_as_long_as_every_direction_stays(self, case, monkeypatch):
        monkeypatch.setattr(slicegpt, "directions", lambda *_, **__: WIDTH)
        expected = case.model(input_ids=case.ids).logits
        for settings in ({"rotations": "one"}, {"rotations": "each"}, {"rotations": "each", "normed": False}):
            network = slicegpt.slice_gpt(case, 1.0, **settings)
            torch.testing.assert_close(network(input_ids=case.ids).logits, expected, rtol=1e-3, atol=1e-3)

    def test_a_stream_that_lies_in_a_subspace_is_cut_to_it_without_loss(self, case):
        low = Case(copy.deepcopy(case.model), case.ids, dtype=torch.float64)
        basis = torch.linalg.qr(torch.randn(WIDTH, 30, dtype=torch.float64)).Q
        onto = basis @ basis.T
        low.model.model.embed_tokens.weight.data @= onto
        for layer in low.layers:
            layer.self_attn.o_proj.weight.data = onto @ layer.self_attn.o_proj.weight
            layer.mlp.down_proj.weight.data = onto @ layer.mlp.down_proj.weight
        expected = low.model(input_ids=case.ids).logits
        share = 30 / WIDTH + 0.001
        assert slicegpt.directions(low, share, own=False) == 30
        network = slicegpt.slice_gpt(low, share, "one")
        torch.testing.assert_close(network(input_ids=case.ids).logits, expected, rtol=1e-3, atol=1e-3)

    def test_the_first_rotation_holds_the_directions_of_most_variance_after_the_norm(self, case, streams):
        kept = slicegpt.directions(case, 0.74, own=True)
        network = slicegpt.slice_gpt(case, 0.74, "each")
        x = streams[0].flatten(0, 1)
        x = x / x.square().mean(1, keepdim=True).sqrt()
        values, vectors = torch.linalg.eigh(x.T @ x)
        top = vectors[:, values.argsort(descending=True)[:kept]]
        cut = network.model.embed_tokens.weight
        dense = case.model.model.embed_tokens.weight
        torch.testing.assert_close(cut @ cut.T, dense @ top @ top.T @ dense.T, rtol=1e-3, atol=1e-3)


class TestSurgeon:
    @staticmethod
    def error(x, weight, kept):
        """Least mean squared error of the outputs from these inputs alone, by least squares on the samples."""
        y = x @ weight.T
        return float((y - x[:, kept] @ torch.linalg.lstsq(x[:, kept], y).solution).square().sum() / len(x))

    @pytest.mark.parametrize("block", [1, 3])
    def test_each_unit_to_go_is_the_one_whose_removal_costs_least_after_a_re_fit(self, layer, block):
        x, each = layer
        each = Layer(each.weight, each.gram, block)
        left = list(range(12 // block))
        for unit in removal_order(each, 12 // block - 1).tolist():
            errors = {
                u: self.error(x, each.weight, each.members(torch.tensor([v for v in left if v != u]))) for u in left
            }
            assert unit == min(errors, key=errors.__getitem__)
            left.remove(unit)

    def test_weights_left_are_those_of_least_squares_on_the_samples(self, layer):
        x, each = layer
        kept = torch.tensor([0, 3, 4, 8, 11])
        expected = torch.linalg.lstsq(x[:, kept], x @ each.weight.T).solution.T
        torch.testing.assert_close(refitted(each, kept), expected)

    @pytest.mark.parametrize("sequential", [False, True])
    def test_every_block_keeps_the_same_widths(self, case, sequential):
        network = ziplm.zip_lm(case, 0.74, groups=2, damping=1e-2, sequential=sequential)
        widths = {(b.self_attn.k_proj.out_features, b.mlp.down_proj.in_features) for b in layers_of(network)}
        assert len(widths) == 1
        assert widths.pop()[0] == 2 * SIZE

    def test_moments_come_from_the_network_pruned_so_far(self, case):
        """The last layer of all is then the least-squares fit to the dense weights on its own inputs."""
        network = ziplm.zip_lm(case, 0.74, groups=3, damping=0.0, sequential=True)
        probe = copy.deepcopy(network)
        dense, last = case.layers[-1].mlp, layers_of(probe)[-1].mlp
        last.gate_proj, last.up_proj = dense.gate_proj, dense.up_proj
        last.down_proj = copy.deepcopy(dense.down_proj)
        seen = []
        last.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        probe(input_ids=case.ids)
        kept = [
            next(i for i, w in enumerate(dense.gate_proj.weight) if torch.equal(w, row))
            for row in layers_of(network)[-1].mlp.gate_proj.weight
        ]
        x = seen[0].detach()
        expected = torch.linalg.lstsq(x[:, kept], x @ dense.down_proj.weight.detach().T).solution.T
        torch.testing.assert_close(layers_of(network)[-1].mlp.down_proj.weight.detach(), expected, rtol=1e-2, atol=1e-3)


class TestTaylor:
    def test_importance_is_the_first_order_change_of_the_loss(self, case):
        """Against the slope of the loss along the weights of one unit, by differences; the sum of a vector, signed."""
        product = taylor.salience(case)[2]
        layer = case.layers[2]
        slopes = []
        for name, j in itertools.product(("gate_proj", "up_proj", "down_proj"), (0, 5)):
            losses = []
            for scale in (1 - 5e-3, 1 + 5e-3):
                model = copy.deepcopy(case.model)
                weight = layers_of(model)[2].mlp.get_submodule(name).weight.data
                (weight[:, j] if name == "down_proj" else weight[j]).mul_(scale)
                logits = model(input_ids=case.ids).logits.detach()[:, :-1]
                losses.append(float(F.cross_entropy(logits.flatten(0, 1), case.ids[:, 1:].flatten())))
            slopes.append((losses[1] - losses[0]) / 1e-2)
        found = [
            product[n].sum(0 if n == "down_proj" else 1)[j]
            for n, j in itertools.product(("gate_proj", "up_proj", "down_proj"), (0, 5))
        ]
        torch.testing.assert_close(torch.stack(found), torch.tensor(slopes, dtype=torch.float64), rtol=2e-3, atol=1e-6)
        _, vector = taylor.importances(product, GROUPS, element=False)
        expected = sum(abs(slope) for slope in slopes[1::2])
        assert float(vector[5]) == pytest.approx(expected, rel=1e-3)
        assert layer is case.layers[2]

    def test_elements_of_a_group_are_summed_over_its_heads(self, case):
        product = taylor.salience(case)[1]
        by_group, _ = taylor.importances(product, GROUPS, element=True)
        wide, narrow = (
            slice(2 * SIZE, 4 * SIZE),
            slice(SIZE, 2 * SIZE),
        )  # the second group: two heads on one key and value
        expected = sum(
            float(part.abs().sum())
            for part in (
                product["q_proj"][wide],
                product["k_proj"][narrow],
                product["v_proj"][narrow],
                product["o_proj"][:, wide],
            )
        )
        assert float(by_group[1]) == pytest.approx(expected, rel=1e-5)

    def test_blocks_at_both_ends_stay_dense(self, case, monkeypatch):
        monkeypatch.setattr(taylor, "FIRST", 1 / 4)
        monkeypatch.setattr(taylor, "LAST", 1 / 4)
        network = taylor.llm_pruner(case, 0.74, groups=2, element=True, ends=False)
        assert [b.mlp.down_proj.in_features == MLP for b in layers_of(network)] == [True, False, False, True]


class TestMultiPruner:
    def brute(self, case, share):
        """The paper's loop on whole networks: every candidate is built anew and scored on its own."""
        stitched = Stitched(case, multipruner.Magnitudes(case))
        ids = case.ids[: multipruner.SEQUENCES]
        levels = torch.zeros_like(stitched.most)
        quota = stitched.steps(share)
        until = 0.0
        for portion, places in zip(multipruner.DISTRIBUTION, ("any", "odd", "even"), strict=True):
            until += portion * quota
            while levels.sum() < until - 1e-9:
                candidates = []
                for i in range(len(levels)):
                    new = levels.clone()
                    new[i] = stitched.most[i] if places == "any" else levels[i] + 1
                    whole = new[i] == stitched.most[i]
                    allowed = (
                        levels[i] < stitched.most[i] if places == "any" else i % 2 == (places == "odd") and not whole
                    )
                    if allowed and new[i] <= stitched.most[i]:
                        candidates.append((mean_loss(stitched.network(new), ids), new))
                levels = min(candidates, key=lambda scored: scored[0])[1]
        return levels

    @pytest.mark.parametrize("share", [0.9, 0.7])
    def test_the_greedy_order_is_that_of_scoring_everything_on_whole_networks(self, case, share):
        found = multipruner.multi_pruner(case, share, lazy=False)
        expected = Stitched(case, multipruner.Magnitudes(case)).network(self.brute(case, share))
        torch.testing.assert_close(found(input_ids=case.ids).logits, expected(input_ids=case.ids).logits)

    def test_a_lazy_choice_is_the_best_wherever_increases_only_grow(self):
        true = {("a", 1): 3.0, ("b", 1): 1.0, ("c", 1): 2.0}
        known = {("a", 1): 2.5, ("b", 1): 0.5, ("c", 1): 1.5}
        asked = []
        best = multipruner.least(list(true), known, lambda move: asked.append(move) or true[move])
        assert best == ("b", 1)
        assert asked == [("b", 1)]

    def test_units_are_ordered_by_the_absolute_weights_that_make_them(self, case):
        parts = multipruner.Magnitudes(case)
        mlp = copy.deepcopy(case.layers[0].mlp).requires_grad_(False)
        sizes = [float(mlp.gate_proj.weight[j].abs().sum() + mlp.up_proj.weight[j].abs().sum()) for j in range(MLP)]
        assert parts.neurons(0, 40)[0].tolist() == sorted(sorted(range(MLP), key=sizes.__getitem__)[-40:])
        attention = copy.deepcopy(case.layers[0].self_attn).requires_grad_(False)
        by_group = []
        for g in range(GROUPS):
            key = attention.k_proj.weight[g * SIZE : (g + 1) * SIZE].abs().sum()
            value = attention.v_proj.weight[g * SIZE : (g + 1) * SIZE].abs().sum()
            query = attention.q_proj.weight[2 * g * SIZE : 2 * (g + 1) * SIZE].abs().sum()
            by_group.append(float(query + 2 * key + 2 * value))
        assert parts.groups(0, 1)[0].tolist() == [by_group.index(max(by_group))]


class TestEvoPress:
    def test_switches_keep_the_number_of_steps_and_the_bounds(self, stitched):
        generator = torch.Generator().manual_seed(0)
        levels = evopress.first(stitched.most, 17, generator)
        changed = 0
        for _ in range(200):
            new = evopress.switched(levels, stitched.most, generator)
            assert new.sum() == levels.sum() == 17
            assert ((new >= 0) & (new <= stitched.most)).all()
            assert (new - levels).abs().sum() <= 2 * evopress.SWITCHES
            changed += int((new != levels).any())
            levels = new
        assert changed > 190  # a second switch may undo the first

    def test_streams_shared_with_the_base_change_no_score(self, case, stitched):
        generator = torch.Generator().manual_seed(1)
        scorer = Scorer(stitched, case.ids, next_token(case.ids))
        base = evopress.first(stitched.most, 17, generator)
        scorer.rebase(base)
        for _ in range(5):
            child = evopress.switched(base, stitched.most, generator)
            assert scorer.score(child) == pytest.approx(mean_loss(stitched.network(child), case.ids))

    def test_the_best_never_gets_worse_and_evaluations_are_counted(self, case, stitched):
        generator = torch.Generator().manual_seed(2)
        scorer = Scorer(stitched, case.ids, next_token(case.ids))
        best = evopress.select(
            scorer, [evopress.first(stitched.most, 17, generator) for _ in range(4)], None, generator
        )
        scores = [best[1]]
        for _ in range(4):
            children = [evopress.switched(best[0], stitched.most, generator) for _ in range(4)]
            best = evopress.select(scorer, children, best, generator)
            scores.append(best[1])
        assert scores == sorted(scores, reverse=True)
        each = (4 * evopress.FIRST + evopress.SURVIVORS * len(case.ids)) / len(case.ids)
        assert scorer.evaluations == pytest.approx(5 * each)

    def test_a_part_at_its_highest_level_is_gone(self, case, stitched):
        levels = torch.zeros_like(stitched.most)
        levels[[2, 5]] = stitched.most[[2, 5]]
        network = stitched.network(levels)
        gone = sum(p.numel() for p in case.layers[1].self_attn.parameters()) + WIDTH
        gone += sum(p.numel() for p in case.layers[2].mlp.parameters()) + WIDTH
        assert parameters(network) == case.parameters - gone


@pytest.mark.slow
@pytest.mark.parametrize(("method", "space"), [*((OURS, space) for space in SPACES), (OURS_WRITTEN, "channels")])
def test_a_search_of_ours_meets_the_same_count_and_leaves_the_stream_as_wide_as_it_is(case, method, space):
    single = Case(copy.deepcopy(case.model).float(), case.ids.repeat(3, 1)[:64], evaluations=2, dtype=torch.float32)
    network = METHODS[method][space](single, 0.74)
    assert parameters(network) <= 0.7405 * single.parameters
    assert network.model.embed_tokens.weight.shape == single.model.model.embed_tokens.weight.shape
    assert single.kept["evaluations"] == 2


class TestHarness:
    FOUND = {
        "dense": {"news": 3.0, "wikipedia": 4.0},
        "cells": {
            f"{method} | {variant} | {share} | {seed}": {"news": 3 + rise, "wikipedia": 4 + rise, "cpu_seconds": 1.0}
            for method, variant, share, seed, rise in [
                ("FLAP", "as in the paper", "80%", 0, 0.4),
                ("FLAP", "heads squared, as in its code", "80%", 0, 0.3),
                ("FLAP", "heads squared, as in its code", "80%", 1, 0.5),
                ("ShortGPT", "block influence", "80%", 0, 0.8),
                ("autoprune", "channels", "80%", 0, 0.2),
            ]
        },
    }

    def test_all_variants_are_tried_once_and_the_best_goes_on(self):
        left = list(cells(self.FOUND, ["FLAP"], [0.9, 0.8], [0, 1]))
        best = "heads squared, as in its code"
        assert left == [("FLAP", best, 0.9, 0), ("FLAP", best, 0.9, 1)]
        first = next(cells({"cells": {}}, ["FLAP"], [0.9, 0.8], [0, 1]))
        assert first == ("FLAP", "as in the paper", 0.8, 0)

    def test_variants_must_be_tried_before_another_share(self):
        with pytest.raises(ValueError, match="must be tried first"):
            list(cells({"cells": {}}, ["FLAP"], [0.9], [0]))

    def test_the_report_compares_ours_with_the_best_peer_of_each_share(self):
        text = report(self.FOUND)
        assert "| FLAP | 0.400 ± 0.100 (30.0) x2 |" in text
        assert "| news | autoprune | 0.50 of FLAP's |" in text
