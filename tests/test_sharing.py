"""Shared computation: the same scores to the last bit with less work, and none of it where that cannot be known."""

import dataclasses
import itertools
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import autoprune
from autoprune.evaluators import AdaptiveBN, Compensated
from autoprune.evaluators.activation_cache.cache import ActivationCache
from autoprune.evaluators.activation_cache.flow import flow_of
from autoprune.evaluators.activation_cache.passes import Pass
from autoprune.evaluators.activation_cache.resume_points import Cut, Flow, NothingToShareError, choose_cuts
from autoprune.evaluators.activation_cache.store import Store
from autoprune.evaluators.activation_cache.writes import watching
from autoprune.execution import LocalExecutor
from autoprune.structure.slicing.slicing import Edit, Slicer
from tests.sharing import Block, assert_identical, cache_of, chain, context_of, counted, prepared, relatives
from zoo import ZOO

NOTHING = Edit({}, {})


class Overwriting(nn.Module):
    """Writes to what its blocks return, as residual networks written with ``+=`` do."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(True), nn.Conv2d(12, 8, 1))
            for _ in range(3)
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            y = block(x)
            y += x
            x = y.relu_()
        return self.head(x.mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AdaptiveBN, Compensated])
@pytest.mark.parametrize("name", ["vgg_bn", "preactivation_resnet", "mobilenet_v2", "unet"])
def test_scores_are_the_same_to_the_last_bit_with_less_work(name, kind):
    context = context_of(ZOO[name].build(), *(x.shape[1:] for x in ZOO[name].inputs()))
    candidates = relatives(context.space)
    evaluator, plain = prepared(kind, context, 2**28), prepared(kind, context, 0)
    naive_macs, expected = counted(lambda: plain.evaluate(candidates))
    macs, found = counted(lambda: evaluator.evaluate(candidates))
    assert_identical(found, expected)
    assert cache_of(evaluator).proven
    assert macs < naive_macs


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AdaptiveBN, Compensated])
def test_held_out_scores_take_the_statistics_that_are_remembered(kind):
    context = context_of(ZOO["vgg_bn"].build(), *(x.shape[1:] for x in ZOO["vgg_bn"].inputs()))
    candidates = relatives(context.space)
    evaluator, plain = prepared(kind, context, 2**28), prepared(kind, context, 0)
    evaluator.evaluate(candidates)
    naive_macs, expected = counted(lambda: plain.test(candidates[1]))
    macs, found = counted(lambda: evaluator.test(candidates[1]))
    assert_identical([found], [expected])
    assert macs < naive_macs


@pytest.mark.slow
def test_outputs_that_the_model_writes_to_are_kept_as_they_were():
    context = context_of(Overwriting().eval(), (3, 8, 8))
    candidates, evaluator = relatives(context.space), prepared(AdaptiveBN, context, 2**28)
    assert any(cut.overwritten for cut in cache_of(evaluator).cuts)
    expected = prepared(AdaptiveBN, context, 0).evaluate(candidates)
    for _ in range(2):
        assert_identical(evaluator.evaluate(candidates), expected)
    assert cache_of(evaluator).proven


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_memory_stays_within_the_limit_and_scores_stay_the_same(share):
    context = context_of(chain(Block, 6), (3, 8, 8))
    candidates = relatives(context.space, n=8)
    free = prepared(AdaptiveBN, context, 2**30)
    expected, everything = free.evaluate(candidates), cache_of(free).store.used
    limit = int(share * everything)
    evaluator = prepared(AdaptiveBN, context, limit)
    for candidate, score in zip(candidates, expected, strict=True):
        assert_identical(evaluator.evaluate(candidate[None]), [score])
        outputs = [kept.outputs for kept in cache_of(evaluator).store.kept.values()]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tree_leaves(outputs)}
        assert sum(held.values()) <= cache_of(evaluator).store.used <= limit
    assert cache_of(evaluator).store.used > 0


@pytest.mark.slow
def test_chunks_of_the_validation_data_share_their_calibration():
    context = context_of(chain(Block, 6), (3, 8, 8))
    candidate = relatives(context.space)[-1:]
    evaluator, plain = prepared(AdaptiveBN, context, 2**28), prepared(AdaptiveBN, context, 0)
    chunks = [slice(i, i + 1) for i in range(len(context.subsets.validation))]
    naive_macs, expected = counted(lambda: [plain.evaluate(candidate, chunk)[0] for chunk in chunks])
    macs, found = counted(lambda: [evaluator.evaluate(candidate, chunk)[0] for chunk in chunks])
    assert_identical(found, expected)
    samples = context.subsets.samples
    once = samples["calibration"] + samples["validation"]
    proof = samples["calibration"] + len(context.subsets.validation[1][0])  # the second chunk, once more
    assert macs / naive_macs == pytest.approx((once + proof) / once, rel=1e-3)


class Noisy(Block):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.rand_like(x)


class Remembering(Block):
    def forward(self, x):
        self.last_mean = x.mean()
        return super().forward(x)


class Collecting(Block):
    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes = [*self.sizes[-3:], len(x)]
        return super().forward(x)


class ChangingWithTheBatch(Block):
    def forward(self, x):
        return super().forward(x) * 2 if len(x) == 12 else super().forward(x)


RUN = []


class CountingOutside(Block):
    """Depends on which blocks have run since the first, in a way that no trace shows."""

    def __init__(self):
        super().__init__()
        self.first = False

    def forward(self, x):
        if self.first:
            RUN.clear()
        RUN.append(None)
        return super().forward(x) * (1 + len(RUN))


def test_a_plain_chain_of_blocks_can_be_resumed_behind_each():
    flow = flow_of(chain(Block), [(torch.randn(2, 3, 8, 8), None)], autoprune.data.batch.default_forward)
    assert {"1", "2", "3"} <= {cut.name for cut in flow.cuts}
    (cut,) = (cut for cut in flow.cuts if cut.name == "2")
    assert cut.skipped == ("0", "1")
    assert {"0", "1.conv1", "2.norm", "2"} <= cut.hidden
    assert not any(name.startswith("3") for name in cut.hidden)
    assert cut.macs == pytest.approx(2 * 64 * (3 * 8 * 9 + 2 * 8 * 12 * 10))
    assert cut.sample_bytes == 4 * 8 * 64


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Noisy, "draws random numbers"),
        (Remembering, "writes the attribute Remembering.last_mean"),
        (Collecting, "writes the attribute Collecting.sizes"),
        (ChangingWithTheBatch, "take different ways"),
    ],
)
def test_what_may_depend_on_more_than_its_input_is_not_shared(block, reason):
    model = chain(block)
    batches = [(torch.randn(size, 3, 8, 8), None) for size in (16, 12)]
    with pytest.raises(NothingToShareError, match=reason):
        flow_of(model, batches, autoprune.data.batch.default_forward)


@pytest.mark.slow
@pytest.mark.parametrize("block", [Remembering, ChangingWithTheBatch])
def test_models_that_share_nothing_are_scored_all_the_same(block):
    context = context_of(chain(block), (3, 8, 8))
    candidates = relatives(context.space, n=3)
    evaluator = prepared(AdaptiveBN, context, 2**28)
    assert not cache_of(evaluator).cuts
    assert_identical(evaluator.evaluate(candidates), prepared(AdaptiveBN, context, 0).evaluate(candidates))


@pytest.mark.slow
def test_a_dependence_that_no_trace_shows_ends_sharing_at_the_first_difference(caplog):
    model = chain(CountingOutside)
    model[1].first = True
    context = context_of(model, (3, 8, 8))
    evaluator = prepared(AdaptiveBN, context, 2**28)
    assert cache_of(evaluator).cuts
    assert not cache_of(evaluator).on
    assert "outputs differ when the model resumes behind" in caplog.text
    candidates = relatives(context.space, n=3)
    assert_identical(evaluator.evaluate(candidates), prepared(AdaptiveBN, context, 0).evaluate(candidates))


@pytest.mark.slow
def test_a_wrong_score_ends_sharing_at_the_first_candidate_that_resumes(monkeypatch, caplog):
    context = context_of(chain(Block), (3, 8, 8))
    evaluator, candidates = prepared(AdaptiveBN, context, 2**28), relatives(context.space, n=3)
    cached = Pass._cached
    monkeypatch.setattr(Pass, "_cached", lambda *place: cached(*place) * 1.001)
    assert_identical(evaluator.evaluate(candidates), prepared(AdaptiveBN, context, 0).evaluate(candidates))
    assert not cache_of(evaluator).on
    assert "scores differ" in caplog.text


@pytest.mark.slow
def test_a_failure_is_a_failure_without_sharing_too():
    context = context_of(ZOO["mlp"].build(), (64,))

    def forward(model, batch):
        if model[-1].in_features < 20:
            raise RuntimeError("too narrow")
        return model(batch[0])

    context = dataclasses.replace(context, forward=forward)
    last = len(context.space.sizes) - 1
    narrow, fine = np.zeros((2, last + 1), dtype=np.int64)
    narrow[last], fine[last] = context.space.sizes[last] - 1, 1
    evaluator = prepared(AdaptiveBN, context, 2**28)
    outcomes = evaluator.evaluate(np.stack([fine, narrow, fine, narrow]))
    plain = prepared(AdaptiveBN, context, 0).evaluate(np.stack([fine, narrow]))
    assert_identical([outcomes[0], outcomes[2]], [plain[0], plain[0]])
    assert [o.reason for o in (outcomes[1], outcomes[3])] == 2 * [plain[1].reason] == 2 * ["RuntimeError: too narrow"]
    assert cache_of(evaluator).on


class HoldingModulesInAList(Block):
    """Writes to a module that PyTorch does not know of."""

    def __init__(self):
        super().__init__()
        self.counters = [nn.Identity()]

    def forward(self, x):
        self.counters[0].calls = 1
        return super().forward(x)


def test_writes_to_modules_in_plain_lists_are_noticed():
    with pytest.raises(NothingToShareError, match=r"writes the attribute Identity\.calls"):
        flow_of(chain(HoldingModulesInAList), [(torch.randn(2, 3, 8, 8), None)], autoprune.data.batch.default_forward)


def test_a_watched_pass_notes_its_own_writes_alone_and_replaces_nothing_of_pytorch():
    original, others, written = nn.Module.__setattr__, [], []

    def forward(model, batch):
        def write():
            others.append(Remembering())
            others[0].conv1.groups = 1
            others.append(nn.Module.__setattr__)

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        return model(batch[0])

    model = chain(Remembering, 1)
    watching(forward, written)(model, (torch.randn(2, 3, 8, 8), None))
    assert written == ["Remembering.last_mean", "1.last_mean"]  # as it is written, and by comparison afterwards
    assert others[1] is original
    assert type(model[1]) is Remembering


class Particular(nn.Sequential):
    """Asks for the exact class of its first module, which an intercepted call changes; tracing does not see it."""

    def forward(self, x):
        return super().forward(x) * (1 if x.is_meta or type(self[0]) is nn.Conv2d else 2)


def test_a_dependence_on_the_exact_class_of_a_module_ends_sharing_before_any_score(caplog):
    context = context_of(Particular(*chain(Block)).eval(), (3, 8, 8))
    cache = ActivationCache(context, Slicer(context.model).cut(NOTHING), 2**28)
    assert "0" in cache.cuts[-1].skipped
    assert not cache.on
    assert "outputs differ when the calls of modules are intercepted" in caplog.text


def test_a_candidate_cannot_run_outside_its_block():
    context = context_of(chain(Block), (3, 8, 8))
    cache = ActivationCache(context, Slicer(context.model).cut(NOTHING), 2**28)
    with cache.candidate(NOTHING, chain(Block)) as running:
        pass
    with pytest.raises(RuntimeError, match="run must be called inside the with block"):
        running.run(context.subsets.validation[0])


class Family:
    """Relatives of one network, run through a cache of their own, all with one change in the last block."""

    def __init__(self, seed, meet=lambda: None):
        torch.manual_seed(seed)
        model = chain(Block, 3)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) / 10)
        self.meets = False
        context = context_of(model, (3, 8, 8))

        def forward(module, batch):
            if self.meets:
                meet()  # inside a pass, so that the calls of both skeletons are intercepted at the same time
            return module(batch[0])

        self.context = dataclasses.replace(context, forward=forward)
        self.slicer = Slicer(model)
        self.cache = ActivationCache(self.context, self.slicer.cut(NOTHING).eval(), 2**28)
        self.meets = True

    @torch.no_grad()
    def outputs(self):
        """Outputs of three relatives, and how many of them resumed."""
        sizes = self.context.space.sizes
        candidates = np.zeros((3, len(sizes)), dtype=np.int64)
        candidates[:, -1] = 1, 2, 1
        found, resumed = [], 0
        for candidate in candidates.tolist():
            edit = self.context.structure.edit(self.context.space.pruning(candidate))
            with self.cache.candidate(edit, self.slicer.cut(edit)) as running:
                found += [running.run(batch) for batch in self.context.subsets.validation]
            resumed += running.resumed
        return found, resumed


def test_caches_in_two_threads_do_not_disturb_each_other():
    alone = [Family(seed).outputs() for seed in (0, 1)]
    assert all(resumed == 2 for _, resumed in alone)
    meeting = threading.Barrier(2, timeout=30)
    families, found = [Family(seed, meeting.wait) for seed in (0, 1)], {}
    threads = [
        threading.Thread(target=lambda i=i, family=family: found.update({i: family.outputs()}))
        for i, family in enumerate(families)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (outputs, resumed) in enumerate(alone):
        assert found[i][1] == resumed
        assert all(map(torch.equal, found[i][0], outputs))
        assert families[i].cache.on
        assert type(families[i].slicer.skeleton[1]) is Block


class SkipToTheEnd(nn.Module):
    """The output of the first block is read at the end again, and a shared one is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.twice, self.head = Block(), Block(), Block(), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        first = self.first(x)
        return self.head(self.twice(self.twice(self.second(first))) + first)


def test_what_is_read_again_after_a_cut_runs_and_what_is_called_twice_is_never_skipped():
    flow = flow_of(SkipToTheEnd().eval(), [(torch.randn(2, 8, 8, 8), None)], autoprune.data.batch.default_forward)
    cuts = {cut.name: cut for cut in flow.cuts}
    assert not cuts["second"].hidden & {"first", "first.conv2"}
    assert not any("twice" in name for cut in flow.cuts for name in cut.hidden)


def test_cuts_are_chosen_for_what_they_save_within_the_memory():
    def cut(name, end, macs, nbytes):
        return Cut(name, end, (), frozenset(), macs, nbytes, False)

    flow = Flow((cut("a", 1, 10, 100), cut("b", 2, 50, 100), cut("c", 3, 90, 100), cut("d", 4, 95, 5000)), {}, {}, 100)
    firsts = np.array([0, 1, 2, 3, 4])
    assert [c.name for c in choose_cuts(flow, firsts, 2, 10**6)] == ["a", "b", "c", "d"]
    assert [c.name for c in choose_cuts(flow, firsts, 2, 400)] == ["b", "c"]
    assert [c.name for c in choose_cuts(flow, firsts, 2, 200)] == ["c"]
    assert choose_cuts(flow, firsts, 2, 199) == ()


def test_the_least_recently_used_goes_first_and_only_for_what_is_asked_for_again():
    store = Store(100)
    keys = [(name, b"", "validation") for name in "abcd"]
    for key in keys[:2]:
        assert store.admit(key, 50, set()) is not None
    store.find(keys[0])
    store.ask("c", b"")
    assert store.admit(keys[2], 50, set()) is None
    store.ask("c", b"")
    assert store.admit(keys[2], 50, set()) is not None
    assert list(store.kept) == [keys[0], keys[2]]
    for _ in range(2):
        store.ask("d", b"")
    assert store.admit(keys[3], 50, {keys[0], keys[2]}) is None
    assert store.used == store.peak == 100


@pytest.mark.slow
def test_related_candidates_are_evaluated_behind_each_other_under_their_own_numbers():
    context = context_of(ZOO["vgg_plain"].build(), (3, 16, 16))
    first, second = np.zeros((2, len(context.space.sizes)), dtype=np.int64)
    first[0], second[0] = 1, 2
    rows = np.stack([first, second, first, second, first])
    rows[np.arange(5), [-1, -2, -3, -1, -2]] = 1
    evaluator, executor = prepared(AdaptiveBN, context, 2**28), LocalExecutor()
    executor.start(evaluator, context, AdaptiveBN())
    executor.submit([10, 11, 12, 13, 14], rows, [None] * 5)
    finished = [executor.gather()[0] for _ in range(5)]
    families = ["first" if done.trial in (10, 12, 14) else "second" for done in finished]
    assert sum(a != b for a, b in itertools.pairwise(families)) == 1
    by_trial = [outcome for _, outcome, _ in sorted(finished, key=lambda done: done.trial)]
    assert_identical(by_trial, prepared(AdaptiveBN, context, 0).evaluate(rows))


@pytest.mark.slow
def test_most_of_a_scan_of_single_dimensions_is_shared():
    context = context_of(chain(Block, 10), (3, 8, 8))
    candidates = np.repeat(np.diag(context.space.sizes - 1), 2, axis=0)
    candidates[::2] //= 2
    candidates = candidates[np.random.default_rng(0).permutation(len(candidates))]
    evaluator, plain = prepared(AdaptiveBN, context, 2**28), prepared(AdaptiveBN, context, 0)
    macs, _ = counted(lambda: evaluator.evaluate(candidates[evaluator.order(candidates)]))
    naive_macs, _ = counted(lambda: plain.evaluate(candidates))
    assert macs < 0.65 * naive_macs


@pytest.mark.parametrize("kind", [AdaptiveBN, Compensated])
def test_a_negative_limit_is_refused(kind):
    with pytest.raises(ValueError, match="share_bytes must be an integer of at least 0, which shares nothing, got -1"):
        kind(share_bytes=-1)


@pytest.mark.slow
def test_a_finished_search_keeps_no_outputs():
    images = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    evaluator = AdaptiveBN()
    autoprune.search(ZOO["vgg_plain"].build(), "flops <= 60%", images, evaluator=evaluator, trials=6)
    store = cache_of(evaluator).store
    assert store.peak > 0
    assert store.used == 0
    assert not store.kept
