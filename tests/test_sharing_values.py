"""Shared computation of models whose forward pass reads values, as language models read their mask."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import autoprune
from autoprune.evaluators import AdaptiveBN, Compensated
from autoprune.evaluators.activation_cache.resume_points import Flow
from tests.contexts import study_of
from tests.sharing import Block, assert_identical, cache_of, chain, context_of, counted, prepared, relatives


class Deciding(Block):
    def forward(self, x):
        return super().forward(x) if x.mean() > -1e9 else x


class Choosing(Block):
    """Takes one of two ways by the values of a batch."""

    def forward(self, x):
        return super().forward(x) if x[0, 0, 0, 0] > 0 else x + 2 * self.conv2(self.norm(self.conv1(x)).abs())


class Leaving(Block):
    """Runs for some batches alone."""

    def forward(self, x):
        return super().forward(x) if x[0, 0, 0, 0] > 0 else x


class Swapping(nn.Module):
    """Runs two blocks in the one order or the other, by the values of a batch."""

    def __init__(self):
        super().__init__()
        self.early, self.late = Block(), Block()

    def forward(self, x):
        return self.early(self.late(x)) if x[0, 0, 0, 0] > 0 else self.late(self.early(x))


@pytest.mark.parametrize(("block", "shares"), [(Deciding, True), (Choosing, True), (Leaving, False)])
def test_models_that_read_values_share_what_all_batches_compute(block, shares):
    context = context_of(chain(block, 5), (3, 8, 8))
    candidates = relatives(context.space, n=8)
    evaluator, plain = prepared(AdaptiveBN, context, 2**28), prepared(AdaptiveBN, context, 0)
    naive_macs, expected = counted(lambda: plain.evaluate(candidates))
    macs, found = counted(lambda: evaluator.evaluate(candidates))
    assert_identical(found, expected)
    assert cache_of(evaluator).on == shares
    assert (macs < 0.9 * naive_macs) == shares


def test_a_pass_that_goes_another_way_than_the_trace_ends_sharing():
    """Even where scores that are shared count as proven, and each module is called as often: the order tells."""
    x = torch.randn(16 * 9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = [(part, None) for part in x.split(16)]
    model = chain(Swapping, 3)
    taken = {bool(model[0](batch[0])[0, 0, 0, 0] > 0) for batch in batches[3:6]}
    assert taken == {True, False}
    context = study_of(model, autoprune.Data(batches[:3], batches[3:6], batches[6:])).context
    evaluator, plain = prepared(Compensated, context, 2**28), prepared(Compensated, context, 0)
    assert cache_of(evaluator).cuts
    cache_of(evaluator).proven = True
    candidates = relatives(context.space, n=8)
    assert_identical(evaluator.evaluate(candidates), plain.evaluate(candidates))
    assert not cache_of(evaluator).on


def test_what_a_trace_that_reads_values_does_not_read_counts_as_read_first():
    reads = {"a": 3}
    assert Flow((), reads, {}, 0.0).first_read("b") > 10**9
    flow = Flow((), reads, {}, 0.0, calls=("0",))
    assert (flow.first_read("a"), flow.first_read("b")) == (3, -1)


@pytest.mark.parametrize("padded", [False, True])
def test_a_language_model_that_reads_its_mask_resumes_between_its_blocks(padded):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(50, (24, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[::5, :3] = 0
    batches = [{"input_ids": ids[i : i + 4], "attention_mask": mask[i : i + 4]} for i in range(0, 24, 4)]
    data = autoprune.Data(batches[:2], batches[2:4], batches[4:])
    context = study_of(model, data, metric="next_token").context
    candidates = relatives(context.space, n=8)
    evaluator, plain = prepared(Compensated, context, 2**28), prepared(Compensated, context, 0)
    naive_macs, expected = counted(lambda: plain.evaluate(candidates))
    macs, found = counted(lambda: evaluator.evaluate(candidates))
    assert_identical(found, expected)
    assert cache_of(evaluator).on
    assert len(cache_of(evaluator).cuts) >= 4
    assert macs < 0.9 * naive_macs
