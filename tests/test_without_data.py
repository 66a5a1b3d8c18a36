"""Search without data: it works for any inputs, and says what its scores mean where nobody can miss it."""

import pytest
import torch
from torch import nn

import autoprune
from zoo import resnet


class Tokens(nn.Module):
    """Sorts sentences into two kinds; carries example inputs as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 2))

    @property
    def dummy_inputs(self):
        ids = torch.arange(14).view(2, 7)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1)
        return {"logits": self.mlp((self.embedding(input_ids) * mask).sum(1) / mask.sum(1))}


class Critic(nn.Module):
    """Two inputs, one number for each sample, no batch norm."""

    def __init__(self):
        super().__init__()
        self.state, self.action = nn.Linear(5, 16), nn.Linear(3, 16)
        self.value = nn.Sequential(nn.Tanh(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 1))

    def forward(self, state, action):
        return self.value(self.state(state) + self.action(action))


def seeded(make):
    torch.manual_seed(0)
    return make()


CASES = {
    "images": (lambda: resnet(8, width=8, channels=1), lambda: torch.randn(2, 1, 8, 8), "agreement"),
    "tokens, from the model's own example": (Tokens, lambda: None, "agreement"),
    "two inputs, one number": (Critic, lambda: (torch.randn(2, 5), torch.randn(2, 3)), "relative_error"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_searches_and_says_what_the_scores_mean(name):
    make, example, metric = CASES[name]
    model, inputs = seeded(make).eval(), seeded(example)
    result = autoprune.search(model, "flops <= 60%", example=inputs, trials=4, optimizer="random")
    assert (result.metric, len(result.trials)) == (metric, 4)
    assert all(trial.status == "ok" and trial.costs["flops"] <= result.limits["flops"] for trial in result.trials)
    foot = " ".join(str(result).split("\n\n")[1].split())
    first = foot.index("no data given: 256 random inputs")
    assert first < foot.index("search over")
    for words in ("how close a candidate stays to the dense model", "not how well it does its task", "or give data"):
        assert words in foot
    assert "was chosen because there is no data" in foot
    assert "labels are missing" not in foot
    assert ("are taken for logits" in foot) == (metric == "agreement")


@pytest.mark.slow
def test_scores_of_random_inputs_are_those_of_the_built_model():
    model = seeded(Critic).eval()
    example = seeded(lambda: (torch.randn(2, 5), torch.randn(2, 3)))
    result = autoprune.search(model, "flops <= 60%", example=example, trials=4)
    context = result._builder.context
    trial = result.best()
    built, pairs = result.build(trial), [(batch[0], batch[1]) for batch in context.subsets.validation]
    with torch.no_grad():
        outputs = [(model(*pair), built(*pair)) for pair in pairs]
    dense, small = (torch.cat(part) for part in zip(*outputs, strict=True))
    error = (small - dense).square().mean() / outputs[0][0].square().mean()
    assert trial.score == pytest.approx(float(error), rel=1e-4)


@pytest.mark.slow
def test_the_same_seed_draws_the_same_inputs():
    found = [
        autoprune.search(
            seeded(Tokens).eval(), "flops <= 60%", trials=3, seed=seed, optimizer="random"
        )._builder.context.subsets.fingerprint
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.slow
def test_an_audit_of_it_warns_that_it_says_little():
    result = autoprune.search(seeded(Tokens).eval(), "flops <= 60%", trials=6, optimizer="random")
    report = autoprune.audit(result, lambda model: None, 4, repeats=0).audit
    assert any("random inputs: search with data" in note for note in report.notes)
