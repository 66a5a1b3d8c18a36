"""Encoders with decoders take batches as their collators make them: inputs and labels, none of the decoder."""

import pytest
import torch
from torch import nn

import autoprune
from autoprune.data.batch import default_forward

transformers = pytest.importorskip("transformers")

WORDS = 40
SMALL = {
    "vocab_size": WORDS, "d_model": 16, "decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 3,
}  # fmt: skip
HALVES = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip


def t5():
    config = transformers.T5Config(**SMALL, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def bart():
    config = transformers.BartConfig(**SMALL, **HALVES, max_position_embeddings=32)
    return transformers.BartForConditionalGeneration(config)


def mbart():
    config = transformers.MBartConfig(**SMALL, **HALVES, max_position_embeddings=32)
    return transformers.MBartForConditionalGeneration(config)


def whisper():
    config = transformers.WhisperConfig(
        **SMALL, **HALVES, num_mel_bins=8, max_source_positions=16, max_target_positions=16, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def batches_for(model, rows=4, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        labels = torch.randint(4, WORDS, (rows, 6), generator=generator)
        labels[::2, 4:] = -100
        if hasattr(model.config, "num_mel_bins"):
            given = {"input_features": torch.randn(rows, 8, 32, generator=generator)}
        else:
            ids = torch.randint(4, WORDS, (rows, 9), generator=generator)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found.append({**given, "labels": labels})
    return found


@pytest.fixture(params=[t5, bart, mbart, whisper], ids=lambda make: make.__name__)
def model(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return request.param().eval()


@torch.no_grad()
def test_the_decoder_reads_what_the_model_itself_makes_of_the_labels(model):
    (batch,) = batches_for(model, count=1)
    torch.testing.assert_close(default_forward(model, batch).logits, model(**batch, use_cache=False).logits)
    own = {**batch, "decoder_input_ids": torch.full_like(batch["labels"], 5)}
    expected = model(**{key: value for key, value in own.items() if key != "labels"}, use_cache=False).logits
    torch.testing.assert_close(default_forward(model, own).logits, expected)


@pytest.mark.slow
def test_a_search_is_scored_by_the_loss_that_the_model_computes_of_the_labels(model):
    parts = [batches_for(model, seed=seed) for seed in range(3)]
    result = autoprune.search(
        model, "flops <= 70%", autoprune.Data(*parts), trials=2, execution=autoprune.Execution(progress=False)
    )
    assert result.metric == "loss", result.notes
    small = result.build()
    for network, score in ((model, result.dense.score), (small, result.best().score)):
        with torch.no_grad():
            losses = [float(network(**batch, use_cache=False).loss) for batch in parts[1]]
        assert score == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    first = next(key for key in parts[0][0] if key.startswith("input"))
    assert len(small.generate(parts[0][0][first], max_new_tokens=3, min_new_tokens=3)) == 4


def test_labels_of_whole_samples_are_not_decoded():
    config = transformers.BartConfig(**SMALL, **HALVES, max_position_embeddings=32, num_labels=3)
    model = transformers.BartForSequenceClassification(config).eval()
    ids = torch.randint(4, WORDS, (4, 9))
    ids[:, -1] = SMALL["eos_token_id"]
    assert default_forward(model, {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0])}).logits.shape == (4, 3)


def test_a_config_of_another_kind_adds_no_input():
    class Tagger(nn.Module):
        config = transformers.T5Config(**SMALL)

        def forward(self, input_ids):
            return input_ids

    batch = {"input_ids": torch.ones(2, 3), "labels": torch.ones(2, 3, dtype=torch.long)}
    assert default_forward(Tagger(), batch) is batch["input_ids"]
