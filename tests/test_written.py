"""Text that a language model writes: its own distribution, the same for a seed, and nothing changed by it."""

import pytest
import torch

from autoprune.data.written import write_text

transformers = pytest.importorskip("transformers")
WORDS, START = 12, 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=WORDS, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(40)  # else all words are about as likely
    return made


def test_words_are_as_likely_as_the_model_says(model):
    ids = write_text(model, START, samples=400, tokens=20)
    assert ids.dtype == torch.int64
    assert ids.shape == (400, 20)
    begun = torch.cat([torch.full((400, 1), START), ids], 1)
    with torch.no_grad():
        logs = model(input_ids=begun[:, :-1], use_cache=False).logits.log_softmax(-1).double()
    surprise = -logs.gather(-1, ids[..., None]).squeeze(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    excess = (surprise - entropy).mean(1)  # of mean 0, whatever the model is
    assert entropy.mean() < 0.9 * torch.tensor(WORDS).log()
    assert abs(float(excess.mean())) < 4 * float(excess.std()) / len(excess) ** 0.5


def test_the_same_seed_gives_the_same_text_and_leaves_everything_as_it_was(model):
    state = torch.get_rng_state()
    model.train()
    model.lm_head.eval()
    one = write_text(model, START, samples=5, tokens=7, seed=1, batch_size=2)
    assert model.training
    assert model.model.training
    assert not model.lm_head.training
    model.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, write_text(model, START, samples=5, tokens=7, seed=1, batch_size=2))
    assert not torch.equal(one, write_text(model, START, samples=5, tokens=7, seed=2, batch_size=2))


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(TypeError, match="past_key_values"):
        write_text(torch.nn.Linear(2, 2), 0)
