"""Language models: samples counted in tokens, a search steered by the divergence from the dense model."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autoprune
from autoprune.data.batch import default_forward
from autoprune.data.subsets import TOKENS, materialise
from autoprune.evaluators.training.distillation import labels_loss_of
from autoprune.metrics import choosing
from autoprune.metrics.choosing import resolve_metric
from autoprune.metrics.language import next_token, next_token_by_divergence

VOCABULARY, POSITIONS = 23, 32


class Recurrent(nn.Module):
    """Logits of the next token from a recurrent network of one layer, with room to prune."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.states = nn.GRU(8, 12, batch_first=True)
        self.wide = nn.Linear(12, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(F.relu(self.wide(self.states(self.embed(input_ids))[0])))}


def texts(samples, **further):
    ids = torch.randint(0, VOCABULARY, (samples, POSITIONS), generator=torch.Generator().manual_seed(0))
    whole = {"input_ids": ids} | further
    return [{key: value[i : i + 16] for key, value in whole.items()} for i in range(0, samples, 16)]


@pytest.fixture(scope="module")
def result():
    return autoprune.search(Recurrent().eval(), "flops <= 70%", texts(2048), trials=4)


class TestTokens:
    def test_a_search_uses_as_many_samples_as_hold_the_tokens(self, result):
        (note,) = [note for note in result.notes if "judged by tokens" in note]
        samples = TOKENS["validation"] // POSITIONS
        assert f"{samples} of " in note
        assert {trial.evaluations[-1].samples for trial in result.trials} == {samples}

    def test_the_first_of_the_samples_drawn_are_left(self):
        drawn = materialise(texts(64), 0)
        fewer = drawn.first({"validation": 5})
        assert fewer.samples == drawn.samples | {"validation": 5}
        assert torch.equal(
            torch.cat([batch["input_ids"] for batch in fewer.validation]),
            torch.cat([batch["input_ids"] for batch in drawn.validation])[:5],
        )
        assert fewer.fingerprint != drawn.fingerprint

    def test_a_worker_that_draws_them_itself_leaves_the_same(self):
        def load():
            return texts(64)

        fewer = materialise(autoprune.Data(validation=load), 0).first({"test": 4, "validation": 6})
        received = fewer.to_send().received()
        assert (received.samples, received.fingerprint) == (fewer.samples, fewer.fingerprint)


class TestDivergence:
    @pytest.mark.parametrize("chances", [False, True])
    @torch.no_grad()
    def test_it_steers_the_search_over_tokens_that_are_no_padding(self, chances):
        mask = (torch.arange(POSITIONS) < torch.arange(32)[:, None] + 2).long()
        subsets = materialise(autoprune.Data(validation=texts(32, attention_mask=mask), test=texts(16)), 0)
        dense, other = Recurrent(), Recurrent()
        nn.init.normal_(other.head.weight)

        def run(model):
            return lambda batch: {"logits": last(model(batch["input_ids"])["logits"])}

        last = nn.Softmax(dim=-1) if chances else nn.Identity()
        judge = resolve_metric("auto", subsets, run(dense))
        scores = judge.measure(run(other), subsets.validation, judge.dense_outputs(run(dense), subsets.validation))
        divergences, losses = [], []
        for batch in subsets.validation:
            for ids, kept in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                ours, theirs = (model(ids[None])["logits"][0, kept][:-1].softmax(-1) for model in (other, dense))
                divergences.append((theirs * (theirs / ours).log()).sum(-1))
                losses.append(-ours.log().gather(1, ids[kept][1:, None]).flatten())
        assert scores.signal.mean() == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
        assert scores.metric.mean() == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
        assert "KL(dense || pruned)" in judge.note
        assert ("probabilities" in judge.note) == chances

    def test_a_text_of_one_token_counts_for_nothing(self):
        outputs, batch = torch.randn(2, 1, 5), {"input_ids": torch.zeros(2, 1, dtype=torch.long)}
        assert next_token(False, outputs, batch, None)[0].tolist() == [0, 0]
        assert next_token_by_divergence(False, outputs, batch, outputs + 1)[0].tolist() == [0, 0]

    def test_the_loss_steers_where_dense_outputs_would_take_too_much_memory(self, monkeypatch):
        monkeypatch.setattr(choosing, "MOST_DENSE_BYTES", 1000)
        dense = Recurrent()
        judge = resolve_metric("next_token", materialise(texts(32), 0), lambda batch: dense(batch["input_ids"]))
        assert not judge.needs_dense
        assert "it steers the search, too" in judge.note

    @torch.no_grad()
    def test_a_training_learns_the_next_token(self):
        dense = Recurrent()
        batch = texts(16)[0]
        judge = resolve_metric("auto", materialise(texts(32), 0), lambda batch: dense(batch["input_ids"]))
        outputs = dense(batch["input_ids"])
        expected = F.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        loss = labels_loss_of(judge)
        assert loss is not None
        assert float(loss(outputs, batch, None)[0].mean()) == pytest.approx(float(expected), rel=1e-5)


def test_the_table_shows_the_perplexity(result):
    lines = str(result).splitlines()
    assert "perplexity" in lines[0]
    (dense,) = [line for line in lines if line.lstrip().startswith("dense")]
    assert f"{math.exp(result.dense.score):.4g}" in dense


class TestCache:
    """Models that would keep keys and values are not asked to while they are scored."""

    def test_outputs_are_those_with_a_cache_and_hold_none(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=11
        )
        model = transformers.LlamaForCausalLM(config).eval()
        ids = torch.randint(0, 11, (2, 5))
        with torch.no_grad():
            found, expected = default_forward(model, {"input_ids": ids}), model(ids)
        assert torch.equal(found.logits, expected.logits)
        assert found.past_key_values is None
        assert expected.past_key_values is not None
        assert default_forward(model, {"input_ids": ids, "use_cache": True}).past_key_values is not None

    def test_a_config_of_another_model_is_left_alone(self):
        class Odd(nn.Module):
            config = {"use_cache": True}

            def forward(self, x):
                return x

        odd = Odd()
        x = torch.ones(2)
        assert default_forward(odd, (x, x)) is x
        odd.config = type("Config", (), {"use_cache": True})()
        assert default_forward(odd, (x, x)) is x
