"""Metrics that users of text and dense prediction expect by name, against answers found another way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.data.subsets import Data, materialise
from autoprune.errors import DataError
from autoprune.metrics.choosing import resolve_metric
from autoprune.metrics.metric import Metric

VOCABULARY = 11


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Causal(nn.Module):
    """Sees the mean of all tokens so far."""

    def __init__(self, everything=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.everything = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY), everything

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        seen = x.mean(1, keepdim=True).expand_as(x) if self.everything else x.cumsum(1)
        return {"logits": self.head(seen)}


def texts(n=12, length=7, **more):
    ids = torch.randint(0, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids[i : i + 4], **{k: v[i : i + 4] for k, v in more.items()}} for i in range(0, n, 4)]


def subsets_of(batches):
    return materialise(Data(batches, batches, batches), seed=0)


def forward_of(model):
    def forward(batch):
        with torch.no_grad():
            return model(**{key: value for key, value in batch.items() if key != "labels"})

    return forward


def scored(metric, batches, model, pruned=None):
    subsets, forward = subsets_of(batches), forward_of(model)
    judge = resolve_metric(metric, subsets, forward)
    dense = judge.dense_outputs(forward, subsets.validation)
    return judge, judge.measure(forward_of(pruned or model), subsets.validation, dense), subsets.validation


class TestNextToken:
    def test_it_is_chosen_for_a_language_model_and_is_its_loss(self):
        model = Causal()
        judge, scores, batches = scored("auto", texts(), model)
        logits = torch.cat([forward_of(model)(batch)["logits"] for batch in batches])
        ids = torch.cat([batch["input_ids"] for batch in batches])
        expected = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
        assert (judge.name, judge.higher_is_better, judge.per_sample) == ("next_token", False, True)
        assert scores.metric.mean() == pytest.approx(float(expected), rel=1e-5)

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_padding_does_not_count(self, side):
        mask = (torch.arange(7) < torch.arange(12)[:, None] % 6 + 2).long()
        mask = mask.flip(1) if side == "left" else mask
        model = Causal()
        judge, scores, batches = scored("next_token", texts(attention_mask=mask), model)
        losses = []
        for batch in batches:
            logits = forward_of(model)(batch)["logits"]
            for row, ids, kept in zip(logits, batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                losses.append(F.cross_entropy(row[kept][:-1], ids[kept][1:], reduction="none"))
        assert scores.metric.mean() == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
        assert judge.higher_is_better is False

    def test_labels_say_which_tokens_count(self):
        labels = torch.cat([batch["input_ids"] for batch in texts()])
        labels[:, :4] = -100
        model = Causal()
        _, scores, batches = scored("auto", texts(labels=labels), model)
        logits = torch.cat([forward_of(model)(batch)["logits"] for batch in batches])[:, 3:-1]
        ids = torch.cat([batch["input_ids"] for batch in batches])[:, 4:]
        expected = F.cross_entropy(logits.reshape(-1, VOCABULARY), ids.reshape(-1))
        assert scores.metric.mean() == pytest.approx(float(expected), rel=1e-5)

    def test_a_model_that_sees_all_tokens_foresees_none(self):
        assert scored("auto", texts(), Causal(everything=True))[0].name != "next_token"

    def test_other_outputs_are_refused_in_words(self):
        with pytest.raises(DataError, match="metric='next_token' needs outputs of shape"):
            resolve_metric("next_token", subsets_of(texts()), lambda batch: torch.zeros(4, 3))


class TestAgainstTheDenseModel:
    def test_cosine_is_that_of_each_sample_and_needs_no_labels(self):
        x, dense, pruned = draw(20, 5), draw(5, 4, seed=1), draw(5, 4, seed=2)
        subsets = materialise(Data(*[x.clone() for _ in range(3)], batch_size=8), seed=0)
        judge = resolve_metric("cosine", subsets, lambda batch: batch @ dense)
        kept = judge.dense_outputs(lambda batch: batch @ dense, subsets.validation)
        found = judge.measure(lambda batch: batch @ pruned, subsets.validation, kept)
        rows = torch.cat(subsets.validation)
        expected = [float(a @ b / (a.norm() * b.norm())) for a, b in zip((rows @ dense), (rows @ pruned), strict=True)]
        np.testing.assert_allclose(found.metric, expected, rtol=1e-4)
        np.testing.assert_allclose(found.signal, 1 - found.metric, rtol=1e-6)
        assert judge.higher_is_better

    def test_cosine_of_positions_leaves_padding_out(self):
        class Hidden(nn.Module):
            def forward(self, input_ids, attention_mask):
                return F.one_hot(input_ids, VOCABULARY).float() * attention_mask[..., None] + 0.1

        class Broken(nn.Module):
            """Differs where there is padding alone."""

            def forward(self, input_ids, attention_mask):
                return Hidden()(input_ids, attention_mask) - 5 * (1 - attention_mask[..., None]) * torch.arange(11.0)

        mask = (torch.arange(7) < torch.arange(12)[:, None] % 6 + 2).long()
        _, scores, _ = scored("cosine", texts(attention_mask=mask), Hidden(), Broken())
        np.testing.assert_allclose(scores.metric, 1.0, rtol=1e-5)

    def test_relative_error_is_the_squared_difference_on_one_scale(self):
        x, dense = draw(8, 5), draw(5, 4, seed=1)
        subsets = materialise(Data(*[x.clone() for _ in range(3)], batch_size=8), seed=0)
        judge = resolve_metric("relative_error", subsets, lambda batch: batch @ dense)
        kept = judge.dense_outputs(lambda batch: batch @ dense, subsets.validation)
        found = judge.measure(lambda batch: batch @ dense * 1.1, subsets.validation, kept)
        assert (judge.name, judge.higher_is_better) == ("relative_error", False)
        assert found.metric.mean() == pytest.approx(0.01, rel=1e-3)

    @pytest.mark.parametrize("per_sample", [True, False])
    def test_a_users_metric_gets_the_dense_outputs_if_it_asks(self, per_sample):
        def worst(outputs, batch, dense):
            return (outputs - dense).abs().amax(1)

        def worst_of_all(forward, batches, dense):
            return max(float((forward(b) - d).abs().max()) for b, d in zip(batches, dense, strict=True))

        x, dense = draw(20, 5), draw(5, 4, seed=1)
        subsets = materialise(Data(*[x.clone() for _ in range(3)], batch_size=8), seed=0)
        metric = Metric(worst if per_sample else worst_of_all, False, per_sample=per_sample, needs_dense=True)
        judge = resolve_metric(metric, subsets, lambda batch: batch @ dense)
        kept = judge.dense_outputs(lambda batch: batch @ dense, subsets.validation)
        found = judge.measure(lambda batch: batch @ dense + 0.25, subsets.validation, kept)
        np.testing.assert_allclose(found.metric, 0.25, rtol=1e-4)


class TestMeanIou:
    def test_it_is_the_mean_over_classes_of_the_whole_set_without_void(self):
        labels = torch.randint(0, 3, (20, 5, 5), generator=torch.Generator().manual_seed(3))
        labels[torch.rand(20, 5, 5, generator=torch.Generator().manual_seed(4)) < 0.3] = 255
        subsets = materialise(Data(*[(draw(20, 4, 5, 5), labels) for _ in range(3)], batch_size=8), seed=0)
        judge = resolve_metric("miou", subsets, lambda batch: batch[0])
        found = judge.measure(lambda batch: batch[0], subsets.validation, [None] * len(subsets.validation))
        truth = torch.cat([batch[1] for batch in subsets.validation])
        guess = torch.cat([batch[0].argmax(1) for batch in subsets.validation])
        known = truth != 255
        shares = [
            float(((truth == c) & (guess == c) & known).sum() / (((truth == c) | (guess == c)) & known).sum())
            for c in range(4)
        ]
        assert (judge.name, judge.higher_is_better, judge.per_sample) == ("miou", True, False)
        assert found.metric.tolist() == pytest.approx([np.mean(shares)], rel=1e-6)

    def test_smaller_logits_are_interpolated(self):
        labels = torch.zeros(8, 8, 8, dtype=torch.long)
        labels[:, 4:] = 1
        logits = torch.stack([(1 - labels[:, ::4, ::4]).float(), labels[:, ::4, ::4].float()], 1)
        subsets = materialise(Data(*[(logits, labels) for _ in range(3)], batch_size=8), seed=0)
        judge = resolve_metric("miou", subsets, lambda batch: batch[0])
        assert judge.measure(lambda batch: batch[0], subsets.validation, [None]).metric.tolist() == [1.0]

    def test_labels_out_of_range_are_refused(self):
        subsets = materialise(
            Data(*[(draw(8, 3, 5, 5), torch.full((8, 5, 5), 7)) for _ in range(3)], batch_size=8), seed=0
        )
        with pytest.raises(DataError, match="labels from 0 to 2"):
            resolve_metric("miou", subsets, lambda batch: batch[0])


class TestClassesOfTokens:
    """Labels of shape (n, positions), outputs of shape (n, positions, classes)."""

    @pytest.mark.parametrize("length", [7, VOCABULARY])  # as many positions as classes, too
    @pytest.mark.parametrize("metric", ["auto", "loss"])
    def test_their_loss_is_that_of_all_labelled_tokens(self, metric, length):
        labels = torch.randint(0, VOCABULARY, (12, length), generator=torch.Generator().manual_seed(2))
        labels[::3, 2:] = -100
        model = Causal(everything=True)
        judge, found, batches = scored(metric, texts(length=length, labels=labels), model)
        assert (judge.name, judge.higher_is_better) == ("loss", False)
        logits = torch.cat([forward_of(model)(batch)["logits"] for batch in batches]).flatten(0, 1)
        wanted = torch.cat([batch["labels"] for batch in batches]).flatten()
        assert found.metric.mean() == pytest.approx(float(F.cross_entropy(logits, wanted)), rel=1e-5)

    def test_a_later_batch_with_as_many_positions_as_classes_is_read_alike(self):
        model = nn.Sequential(nn.Linear(5, 4))
        batches = [(draw(12, n, 5, seed=n), torch.randint(0, 4, (12, n))) for n in (7, 4, 9)]
        judge = resolve_metric("loss", subsets_of(batches[:1]), lambda batch: model(batch[0]))
        with torch.no_grad():
            found = judge.measure(lambda batch: model(batch[0]), batches, [None] * 3).metric.mean()
            logits, wanted = (torch.cat(part) for part in zip(*(
                (model(x).flatten(0, 1), y.flatten()) for x, y in batches
            ), strict=True))  # fmt: skip
        assert found == pytest.approx(float(F.cross_entropy(logits, wanted)), rel=1e-5)

    def test_a_causal_language_model_is_refused_with_the_metric_that_shifts(self):
        labels = torch.cat([batch["input_ids"] for batch in texts()])
        with pytest.raises(DataError, match="metric='next_token'"):
            scored("loss", texts(labels=labels), Causal())
