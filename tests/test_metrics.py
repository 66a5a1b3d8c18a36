import pickle
import re
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, kl_divergence

from autoprune.data.batch import slice_batch
from autoprune.data.subsets import Data, materialise
from autoprune.errors import DataError
from autoprune.metrics.choosing import resolve_metric
from autoprune.metrics.judge import Judge
from autoprune.metrics.metric import Metric
from autoprune.metrics.scorers import main_output
from autoprune.metrics.summary import summary

CLASSES = 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(20) % CLASSES


def subsets_of(x, *y):
    """Each part holds all the given samples, in batches of at most 8."""
    return materialise(Data((x, *y), (x, *y), (x, *y), batch_size=8), seed=0)


def linear(outputs=CLASSES, seed=0):
    weight = random(4, outputs, seed=seed)
    return lambda batch: (batch if isinstance(batch, torch.Tensor) else batch[0]) @ weight


INPUTS = random(20, 4)
LABELLED = subsets_of(INPUTS, LABELS)
UNLABELLED = subsets_of(INPUTS)
DENSE, PRUNED = linear(seed=1), linear(seed=2)


def measured(judge, forward=PRUNED, subsets=LABELLED, dense=DENSE):
    return judge.measure(forward, subsets.validation, judge.dense_outputs(dense, subsets.validation))[:2]


def whole(subsets, i):
    return torch.cat([batch[i] for batch in subsets.validation])


def test_a_metric_of_the_user_is_tried_on_few_sequences_of_tokens():
    tried = []
    ids = torch.arange(80).view(20, 4) % CLASSES
    resolve_metric(
        Metric(lambda outputs, _: outputs.sum(1), True),
        subsets_of(ids),
        lambda batch: tried.append(len(batch[0])) or batch[0].float(),
    )
    assert tried == [2]


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, KeyError])
def test_whatever_a_metric_raises_it_is_named(kind):
    def failing(outputs, batch):
        raise kind("no such thing")

    with pytest.raises(ValueError, match=f"metric 'failing' must score the outputs .* but raised {kind.__name__}"):
        resolve_metric(Metric(failing, higher_is_better=True), LABELLED, DENSE)


class TestAuto:
    def test_class_labels_give_accuracy(self):
        judge = resolve_metric("auto", LABELLED, DENSE)
        assert (judge.name, judge.higher_is_better, judge.per_sample) == ("accuracy", True, True)
        assert "the labels are classes of the outputs" in judge.note

    @pytest.mark.parametrize("outputs", [1, 3])
    def test_float_targets_shaped_like_the_outputs_give_mse(self, outputs):
        targets = random(20, outputs).squeeze(-1)
        judge = resolve_metric("auto", subsets_of(INPUTS, targets), linear(outputs))
        assert (judge.name, judge.higher_is_better) == ("mse", False)

    def test_class_labels_of_positions_give_the_loss(self):
        subsets = subsets_of(random(20, CLASSES, 5, 5), torch.randint(0, CLASSES, (20, 5, 5)))
        assert resolve_metric("auto", subsets, lambda batch: batch[0]).name == "loss"

    @pytest.mark.parametrize(
        ("subsets", "reason"),
        [
            (UNLABELLED, "labels are missing"),
            (subsets_of(INPUTS, LABELS + 1), "need labels from 0 to 2, the classes of the outputs, got 3"),
            (subsets_of(INPUTS, torch.zeros(20, 7, dtype=torch.long)), r"of shape \(7, 7\) do not fit"),
        ],
        ids=["none", "out of range", "other shape"],
    )
    def test_anything_else_gives_agreement_with_the_reason(self, subsets, reason):
        judge = resolve_metric("auto", subsets, DENSE)
        assert (judge.name, judge.higher_is_better, judge.needs_dense) == ("agreement", True, True)
        assert re.search(reason, judge.note)


class TestBuiltIn:
    def test_accuracy_counts_top_classes_and_steers_by_cross_entropy(self):
        signal, metric = measured(resolve_metric("accuracy", LABELLED, DENSE))
        scores = torch.cat([PRUNED(batch) for batch in LABELLED.validation]).double().softmax(1).numpy()
        labels = whole(LABELLED, 1).numpy()
        np.testing.assert_array_equal(metric, scores.argmax(1) == labels)
        np.testing.assert_allclose(signal, -np.log(scores[np.arange(20), labels]), rtol=1e-5)

    @pytest.mark.parametrize("name", ["loss", "cross_entropy"])
    def test_loss_averages_the_labelled_positions_of_a_sample(self, name):
        labels = torch.arange(20 * 25).reshape(20, 5, 5) % CLASSES
        labels[:, 2:] = -100
        subsets = subsets_of(random(20, CLASSES, 5, 5), labels)
        judge = resolve_metric(name, subsets, lambda batch: batch[0])
        signal, metric = measured(judge, lambda batch: batch[0], subsets)
        x, y = whole(subsets, 0), whole(subsets, 1)
        np.testing.assert_allclose(metric, [F.cross_entropy(x[i : i + 1], y[i : i + 1]) for i in range(20)], rtol=1e-5)
        np.testing.assert_array_equal(signal, metric)
        assert (judge.name, judge.higher_is_better) == ("loss", False)

    def test_mse_does_not_broadcast_a_missing_dimension(self):
        subsets = subsets_of(INPUTS, random(20))
        judge = resolve_metric("mse", subsets, linear(1))
        _, metric = measured(judge, linear(1), subsets)
        outputs = torch.cat([linear(1)(batch) for batch in subsets.validation]).flatten()
        np.testing.assert_allclose(metric, (outputs - whole(subsets, 1)) ** 2, rtol=1e-6)

    def test_agreement_counts_equal_top_classes_and_steers_by_divergence(self):
        judge = resolve_metric("agreement", UNLABELLED, DENSE)
        signal, metric = measured(judge, PRUNED, UNLABELLED)
        dense, pruned = (
            torch.cat([f(batch) for batch in UNLABELLED.validation]).double().softmax(1).numpy()
            for f in (DENSE, PRUNED)
        )
        np.testing.assert_array_equal(metric, dense.argmax(1) == pruned.argmax(1))
        np.testing.assert_allclose(signal, (dense * np.log(dense / pruned)).sum(1), rtol=1e-4, atol=1e-6)

    def test_agreement_of_the_dense_model_with_itself_is_perfect(self):
        signal, metric = measured(resolve_metric("agreement", UNLABELLED, DENSE), DENSE, UNLABELLED)
        assert not signal.any()
        assert metric.all()

    @pytest.mark.parametrize("labels", [None, random(20, 5)])
    def test_agreement_of_outputs_that_are_no_classes_is_a_relative_error(self, labels):
        subsets = subsets_of(INPUTS) if labels is None else subsets_of(INPUTS, labels)
        dense = linear(1 if labels is None else 5)
        judge = resolve_metric("agreement", subsets, dense)
        assert (judge.name, judge.higher_is_better) == ("relative_error", False)
        _, metric = measured(judge, lambda batch: 1.1 * dense(batch), subsets, dense)
        energy = dense(subsets.validation[0]).square()
        np.testing.assert_allclose(metric[: len(energy)].mean(), 0.01, rtol=1e-4)

    def test_scores_do_not_depend_on_how_samples_are_batched(self):
        for name, subsets in (("accuracy", LABELLED), ("agreement", UNLABELLED)):
            judge = resolve_metric(name, subsets, DENSE)
            halves = [slice_batch(batch, *edge) for batch in subsets.validation for edge in ((0, 3), (3, 9))]
            parts = judge.measure(PRUNED, halves, judge.dense_outputs(DENSE, halves))[:2]
            np.testing.assert_allclose(parts, measured(judge, PRUNED, subsets), rtol=1e-5, atol=1e-7)

    def test_the_dense_model_runs_only_for_metrics_that_need_it(self):
        judge = resolve_metric("accuracy", LABELLED, DENSE)
        assert judge.dense_outputs(None, LABELLED.validation) == (None,) * len(LABELLED.validation)

    def test_half_precision_outputs_are_scored_in_single(self):
        judge = resolve_metric("accuracy", LABELLED, DENSE)
        batch = LABELLED.validation[0]
        half = PRUNED(batch).bfloat16()
        np.testing.assert_array_equal(judge.score_batch(half, batch)[0], judge.score_batch(half.float(), batch)[0])


class TestUserLoss:
    @pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), F.cross_entropy], ids=["module", "function"])
    def test_a_loss_is_asked_for_one_value_a_sample(self, loss):
        judge = resolve_metric(loss, LABELLED, DENSE)
        signal, metric = measured(judge)
        expected = measured(resolve_metric("loss", LABELLED, DENSE))[1]
        np.testing.assert_allclose(metric, expected, rtol=1e-6)
        np.testing.assert_array_equal(signal, metric)
        assert not judge.higher_is_better

    def test_the_users_loss_is_left_alone(self):
        loss = nn.MSELoss()
        resolve_metric(loss, subsets_of(INPUTS, random(20, CLASSES)), DENSE)
        assert loss.reduction == "mean"

    def test_values_are_averaged_over_all_but_the_samples(self):
        subsets = subsets_of(INPUTS, random(20, CLASSES))
        _, metric = measured(resolve_metric(nn.L1Loss(), subsets, DENSE), DENSE, subsets)
        outputs = torch.cat([DENSE(batch) for batch in subsets.validation])
        np.testing.assert_allclose(metric, (outputs - whole(subsets, 1)).abs().mean(1), rtol=1e-6)

    def test_a_loss_that_only_averages_is_asked_about_one_sample_at_a_time(self):
        judge = resolve_metric(average, LABELLED, DENSE)
        _, metric = measured(judge)
        np.testing.assert_array_equal(metric, 1 - measured(resolve_metric("accuracy", LABELLED, DENSE))[1])

    def test_a_loss_of_another_form_is_refused(self):
        with pytest.raises(ValueError, match=r"loss '<lambda>' must return one number.* use autoprune.Metric"):
            resolve_metric(lambda outputs, targets: outputs.sum(0), LABELLED, DENSE)

    def test_a_loss_without_labels_is_refused(self):
        with pytest.raises(DataError, match=r"metric='MSELoss' needs labels.*metric='agreement'"):
            resolve_metric(nn.MSELoss(), UNLABELLED, DENSE)


def average(outputs, targets):
    return (outputs.argmax(1) != targets).float().mean()


def margin(outputs, batch):
    return outputs.gather(1, batch[1][:, None]).squeeze(1)


def mean_margin(forward, batches):
    return torch.cat([margin(forward(batch), batch) for batch in batches]).mean()


class TestUserMetric:
    @pytest.mark.parametrize(("higher", "sign"), [(True, -1), (False, 1)])
    def test_the_signal_is_the_metric_turned_to_lower_is_better(self, higher, sign):
        judge = resolve_metric(Metric(margin, higher_is_better=higher), LABELLED, DENSE)
        signal, metric = measured(judge)
        expected = torch.cat([margin(PRUNED(batch), batch) for batch in LABELLED.validation])
        np.testing.assert_array_equal(metric, expected.double())
        np.testing.assert_array_equal(signal, sign * metric)
        assert (judge.name, judge.higher_is_better) == ("margin", higher)

    def test_truth_values_count_as_zero_and_one(self):
        metric = Metric(lambda outputs, batch: outputs.argmax(1) == batch[1], higher_is_better=True, name="right")
        judge = resolve_metric(metric, LABELLED, DENSE)
        assert judge.name == "right"
        np.testing.assert_array_equal(measured(judge)[1], measured(resolve_metric("accuracy", LABELLED, DENSE))[1])

    @pytest.mark.parametrize(("higher", "sign"), [(True, -1), (False, 1)])
    def test_a_metric_of_the_whole_set_gives_one_value(self, higher, sign):
        judge = resolve_metric(Metric(mean_margin, higher, per_sample=False), LABELLED, DENSE)
        signal, metric = measured(judge)
        value = float(mean_margin(PRUNED, LABELLED.validation))
        assert (judge.per_sample, metric.tolist(), signal.tolist()) == (False, [value], [sign * value])
        assert judge.score_set(PRUNED, LABELLED.validation) == value

    @pytest.mark.parametrize(
        ("returned", "got"),
        [(torch.zeros(3), r"of shape \(3,\)"), (torch.tensor(0.5), r"of shape \(\)"), (0.5, "got 0.5"), (None, "None")],
    )
    def test_a_metric_of_the_wrong_form_is_refused_before_the_search(self, returned, got):
        metric = Metric(lambda outputs, batch: returned, higher_is_better=True, name="odd")
        with pytest.raises(
            ValueError, match=rf"metric 'odd' must return a tensor of shape \(8,\).*{got}.*per_sample=False"
        ):
            resolve_metric(metric, subsets_of(random(16, 4), LABELS[:16]), DENSE)

    @pytest.mark.parametrize("returned", [torch.zeros(3), None, "good"])
    def test_a_whole_set_metric_must_return_a_number(self, returned):
        metric = Metric(lambda forward, batches: returned, higher_is_better=True, per_sample=False, name="odd")
        with pytest.raises(ValueError, match=r"metric 'odd' must return one number.*per_sample=True"):
            measured(resolve_metric(metric, LABELLED, DENSE))


class TestRefusals:
    def test_unknown_names_are_refused_with_the_known_ones(self):
        with pytest.raises(ValueError, match=r"metric must be one of \['accuracy', .*, got 'acc'"):
            resolve_metric("acc", LABELLED, DENSE)

    def test_something_that_is_no_metric_is_refused(self):
        with pytest.raises(ValueError, match=r"metric must be one of .* got 5"):
            resolve_metric(5, LABELLED, DENSE)

    def test_missing_labels_are_named_with_the_way_out(self):
        with pytest.raises(
            DataError, match=r"metric='accuracy' needs labels.*metric='agreement', which needs no labels"
        ):
            resolve_metric("accuracy", UNLABELLED, DENSE)

    @pytest.mark.parametrize(
        ("name", "labels", "outputs", "message"),
        [
            ("accuracy", LABELS.float(), 3, r"integer class labels of shape \(7,\), got torch.float32"),
            ("accuracy", LABELS.reshape(20, 1), 3, r"integer class labels of shape \(7,\), got .* \(7, 1\)"),
            ("accuracy", LABELS, 1, r"outputs of shape \(n, classes\), got .* \(7, 1\)"),
            ("accuracy", LABELS, 2, "labels from 0 to 1, the classes of the outputs, got 2"),
            ("accuracy", LABELS - 101, 3, "labels from 0 to 2, .* got -"),
            ("loss", LABELS.float(), 3, "integer class labels"),
            ("mse", LABELS, 3, r"float targets shaped like the outputs \(7, 3\), got torch.int64"),
            ("mse", random(20, 2), 3, r"float targets shaped like the outputs \(7, 3\), got .* \(7, 2\)"),
        ],
    )
    def test_labels_and_outputs_that_do_not_fit_are_refused(self, name, labels, outputs, message):
        with pytest.raises(DataError, match=f"metric='{name}' needs {message}"):
            resolve_metric(name, subsets_of(INPUTS, labels), linear(outputs))

    def test_outputs_without_a_tensor_are_refused(self):
        with pytest.raises(DataError, match=r"the model must return a tensor.*got 'text'; give autoprune.Call"):
            resolve_metric("auto", LABELLED, lambda batch: "text")

    def test_a_judge_says_which_method_fits_it(self):
        sample, whole = Judge("a", True, "", scorer=lambda *_: None), Judge("b", True, "", whole_set=mean_margin)
        with pytest.raises(ValueError, match="'a' scores samples one by one; use score_batch"):
            sample.score_set(PRUNED, ())
        with pytest.raises(ValueError, match="'b' scores the whole set at once; use score_set"):
            whole.score_batch(None, None)


def test_the_main_output_is_the_logits_or_the_first_tensor():
    loss, logits = torch.zeros(()), torch.ones(2, 3)
    for outputs in (logits, (logits, loss), [logits], OrderedDict(loss=loss, logits=logits), {"out": (logits, loss)}):
        assert main_output(outputs) is logits


def test_non_finite_scores_pass_through():
    judge = resolve_metric("accuracy", LABELLED, DENSE)
    signal, _ = measured(judge, lambda batch: PRUNED(batch) * float("nan"))
    assert np.isnan(signal).all()


@pytest.mark.parametrize("metric", ["accuracy", "agreement", "loss", nn.CrossEntropyLoss(), Metric(margin, True)])
def test_judges_pickle(metric):
    judge = resolve_metric(metric, LABELLED, DENSE)
    np.testing.assert_array_equal(measured(pickle.loads(pickle.dumps(judge))), measured(judge))


def all_outputs(forward, batches):
    return sum(forward(batch).sum() for batch in batches)


def first_outputs(forward, batches):
    return forward(batches[0]).sum()


def outputs_of_a_copy(forward, batches):
    return sum(forward((batch[0].clone(), batch[1])).sum() for batch in batches)


class TestDistortion:
    def distortion(self, metric, subsets=LABELLED, pruned=PRUNED, dense=DENSE, memory_bytes=10**6):
        judge = resolve_metric(metric, subsets, dense)
        kept = judge.dense_outputs(dense, subsets.validation, memory_bytes)
        return judge.measure(pruned, subsets.validation, kept).distortion

    def by_hand(self, subsets, pruned, dense, classes=1):
        """KL(dense || pruned) of every sample."""
        pairs = []
        for batch in subsets.validation:
            p, q = (Categorical(logits=forward(batch).movedim(classes, -1)) for forward in (dense, pruned))
            pairs.append(kl_divergence(p, q).flatten(1).mean(1) if p.logits.ndim > 2 else kl_divergence(p, q))
        return torch.cat(pairs)

    @pytest.mark.parametrize("metric", ["accuracy", "loss", F.cross_entropy, Metric(margin, True)])
    def test_of_class_logits_it_is_the_divergence_of_each_sample(self, metric):
        expected = self.by_hand(LABELLED, PRUNED, DENSE)
        np.testing.assert_allclose(self.distortion(metric), expected, rtol=1e-4)

    @pytest.mark.parametrize(("shape", "classes"), [((3, 5, 6), 1), ((5, 3), 2)], ids=["images", "language"])
    def test_of_logits_of_positions_it_is_the_mean_over_these(self, shape, classes):
        labels = torch.zeros(20, *shape[: classes - 1], *shape[classes:], dtype=torch.long)
        subsets = subsets_of(random(20, *shape), labels)
        metric = Metric(lambda outputs, batch: outputs.flatten(1).sum(1), higher_is_better=True)
        found = self.distortion(metric, subsets, lambda batch: batch[0].square(), lambda batch: batch[0])
        expected = self.by_hand(subsets, lambda batch: batch[0].square(), lambda batch: batch[0], classes)
        np.testing.assert_allclose(found, expected, rtol=1e-4)

    def test_of_named_logits_of_positions_without_labels_the_last_dimension_holds_the_classes(self):
        subsets = subsets_of(random(20, 5, 3))
        metric = Metric(lambda outputs, batch: outputs["logits"].flatten(1).sum(1), higher_is_better=True)
        found = self.distortion(metric, subsets, lambda b: {"logits": b[0] ** 2}, lambda b: {"logits": b[0]})
        np.testing.assert_allclose(found, self.by_hand(subsets, lambda b: b[0] ** 2, lambda b: b[0], 2), rtol=1e-4)

    def test_of_other_outputs_it_is_the_squared_difference_on_one_scale(self):
        subsets = subsets_of(INPUTS, random(20, 3))
        found = self.distortion("mse", subsets, lambda batch: 1.1 * DENSE(batch), DENSE)
        squares = torch.cat([DENSE(batch).square().mean(1) for batch in subsets.validation])
        scale = DENSE(subsets.validation[0]).square().mean()
        np.testing.assert_allclose(found, 0.01 * squares / scale, rtol=1e-4)

    def test_where_the_signal_is_the_distortion_it_is_not_computed_twice(self):
        judge = resolve_metric("agreement", UNLABELLED, DENSE)
        batches = UNLABELLED.validation
        counted = replace(judge, distance=None)
        scores = counted.measure(PRUNED, batches, counted.dense_outputs(DENSE, batches))
        assert scores.distortion is scores.signal
        np.testing.assert_allclose(scores.distortion, self.by_hand(UNLABELLED, PRUNED, DENSE), rtol=1e-4)

    @pytest.mark.parametrize(("outputs", "samples"), [(2, 2), (7, 7), (9, 9), (100, 20)])
    def test_it_covers_the_first_samples_whose_dense_outputs_fit_into_memory(self, outputs, samples):
        everything = self.distortion("accuracy")
        found = self.distortion("accuracy", memory_bytes=outputs * CLASSES * 4 + 3)
        np.testing.assert_array_equal(found, everything[:samples])

    def test_nothing_is_run_or_kept_beyond_the_memory_allowed(self):
        runs = []
        judge = resolve_metric("accuracy", LABELLED, DENSE)
        kept = judge.dense_outputs(lambda b: runs.append(1) or DENSE(b), LABELLED.validation, 9 * CLASSES * 4)
        assert [None if output is None else len(output) for output in kept] == [7, 2, None]
        assert len(runs) == 2

    def test_a_metric_of_the_whole_set_is_watched(self):
        found = self.distortion(Metric(all_outputs, True, per_sample=False))
        np.testing.assert_array_equal(found, self.distortion("accuracy"))

    @pytest.mark.parametrize("fn", [first_outputs, outputs_of_a_copy])
    def test_nothing_is_said_where_a_metric_of_the_whole_set_runs_other_batches(self, fn):
        assert self.distortion(Metric(fn, True, per_sample=False)).shape == (0,)

    @pytest.mark.parametrize("pruned", [lambda batch: DENSE(batch)[:, :2], lambda batch: []])
    def test_outputs_that_do_not_compare_are_not_compared(self, pruned):
        metric = Metric(lambda outputs, batch: torch.zeros(len(batch[0])), higher_is_better=True)
        assert self.distortion(metric, pruned=pruned).shape == (0,)


class TestSummary:
    def test_proportions_have_the_wilson_interval(self):
        values = np.array([1.0] * 45 + [0.0] * 5)
        z, p, n = 1.959964, 0.9, 50
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        mean, stderr, interval = summary(values)
        assert mean == pytest.approx(p)
        assert stderr == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)
        assert interval == pytest.approx((centre - half, centre + half), abs=1e-6)

    def test_a_perfect_accuracy_is_not_certain(self):
        low, high = summary(np.ones(50)).interval
        assert low < 0.95
        assert high == pytest.approx(1.0)

    def test_other_values_have_the_normal_interval(self):
        values = np.random.default_rng(0).normal(3.0, 2.0, 10_000)
        mean, stderr, (low, high) = summary(values)
        assert stderr == pytest.approx(0.02, rel=0.05)
        assert (mean - low, high - mean) == pytest.approx((1.96 * stderr, 1.96 * stderr))

    def test_a_loss_that_is_zero_everywhere_is_no_proportion(self):
        assert summary(np.zeros(50), proportion=False).interval == (0.0, 0.0)

    def test_one_value_has_no_known_error(self):
        mean, stderr, interval = summary(np.array([0.7]))
        assert mean == 0.7
        assert np.isnan([stderr, *interval]).all()
