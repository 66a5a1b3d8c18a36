"""Where built modules come from: the evaluator that scored them, or the weights that were saved with a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import nn

from autoprune.costs import CostFunction
from autoprune.errors import RecipeError
from autoprune.evaluators import Context, Evaluator
from autoprune.result.recipe import attach, load
from autoprune.result.trials import Trial


class Builder(Protocol):
    """Builds the module of a trial."""

    def build(self, trial: Trial) -> nn.Module:
        """A plain module that remembers its recipe and shares no state with anything."""
        ...


@dataclass(frozen=True, eq=False)
class FromEvaluator:
    """Builds what an evaluator scored; holds what a search worked with.

    Attributes:
        evaluator: Prepared on the context.
        context: With the model and the samples.
        fresh: The same evaluator before it was prepared.
        costs: Every cost by name, of candidates (n, d).
    """

    evaluator: Evaluator
    context: Context
    fresh: Evaluator
    costs: Mapping[str, CostFunction]

    def build(self, trial: Trial) -> nn.Module:
        """Cut the trial's candidate from the model."""
        context = self.context
        module = self.evaluator.build(np.array(trial.candidate, dtype=np.int64))
        return attach(module, context.structure.edit(context.space.pruning(trial.candidate)), context.model)


class SavedWeights:
    """Builds from the files beside a saved result."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self._folder = folder
        self._model = model

    def build(self, trial: Trial) -> nn.Module:
        """Load the trial's weights into a copy of the model.

        Raises:
            RecipeError: If the result was saved without them.
        """
        file = weights_file(self._folder, trial)
        if not file.is_file():
            raise RecipeError(f"trial {trial.id} was saved without weights; choose one of the front, or search again")
        return load(file, self._model)


def weights_file(folder: Path, trial: Trial) -> Path:
    """Where a result keeps the weights of a trial."""
    return folder / f"trial-{trial.id:04d}.safetensors"
