"""Outputs that matter: what is returned stays, and the advice on what to leave out."""

import pytest
import torch
from torch import Tensor, nn

from autoprune import Call
from autoprune.inspection import inspect
from tests.small_networks import perceptron


class Sides(nn.Module):
    """Gives its hidden features besides what matters."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.neck, self.head = nn.Linear(4, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        hidden = self.body(x).relu()
        neck = self.neck(hidden).relu()
        return {"logits": self.head(neck), "hidden_states": [x, hidden], "neck": neck}


class SidesInTuple(Sides):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = super().forward(x)
        return made["logits"], made["hidden_states"][1], made["neck"]


def test_what_is_returned_is_named_with_the_outputs_to_pass_for_freeing_it():
    found = inspect(Sides(), torch.ones(2, 4))
    assert not found.groups
    returned = {part.reason: part for part in found.frozen if part.reason.startswith("returned")}
    assert returned.keys() == {"returned as 'logits'", "returned as 'hidden_states'", "returned as 'neck'"}
    hidden = returned["returned as 'hidden_states'"]
    assert hidden.tensors == ("body.weight", "body.bias", "neck.weight")
    assert hidden.remedy == "if it does not matter, pass autoprune.Call(outputs=['logits', 'neck'])"
    assert hidden.params_share == pytest.approx((64 + 16 + 128) / found.dense["params"])
    assert returned["returned as 'logits'"].tensors == ("head.weight", "head.bias")
    assert "returned as 'hidden_states': body.weight, body.bias, neck.weight" in " ".join(str(found).split())


@pytest.mark.parametrize(
    ("model", "outputs", "groups"),
    [
        (Sides(), "logits", ["body", "neck"]),
        (Sides(), ["logits", "neck"], ["body"]),
        (Sides(), lambda made: made["logits"], ["body", "neck"]),
        (SidesInTuple(), 0, ["body", "neck"]),
        (SidesInTuple(), [0, 1], ["neck"]),
    ],
)
def test_outputs_that_do_not_matter_free_what_reaches_them_alone(model, outputs, groups):
    found = inspect(model, Call(inputs=torch.ones(2, 4), outputs=outputs))
    assert [group.name for group in found.groups] == groups
    assert "returned by the model" in {part.reason for part in found.frozen}


@pytest.mark.slow
def test_following_the_advice_frees_what_it_was_given_for():
    model = SidesInTuple()
    advice = next(part.remedy for part in inspect(model, torch.ones(2, 4)).frozen if part.reason == "returned as 1")
    assert advice.endswith("autoprune.Call(outputs=[0, 2])")
    assert [group.name for group in inspect(model, Call(inputs=torch.ones(2, 4), outputs=[0, 2])).groups] == ["body"]


def test_of_two_outputs_the_other_one_is_advised():
    class Two(Sides):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            made = super().forward(x)
            return made["logits"], made["neck"]

    remedies = {part.reason: part.remedy for part in inspect(Two(), torch.ones(2, 4)).frozen}
    assert remedies["returned as 1"] == "if it does not matter, pass autoprune.Call(outputs=0)"


@pytest.mark.parametrize(("model", "outputs"), [(Sides(), "nothing"), (SidesInTuple(), 3), (perceptron(), 0)])
def test_outputs_that_select_nothing_are_refused(model, outputs):
    with pytest.raises(ValueError, match=f"outputs must select from what the model returns .* got {outputs!r}"):
        inspect(model, Call(inputs=torch.ones(2, 4), outputs=outputs))
