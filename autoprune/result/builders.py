"""Builders of modules: from the evaluator that scored them, or from the weights saved with a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import nn

from autoprune.costs import CostFunction
from autoprune.errors import FileFormatError
from autoprune.evaluators import Context, Evaluator
from autoprune.files.access import shortened
from autoprune.files.tensor_file import read_tensors
from autoprune.result.recipe import attach, most_bytes_of, read, read_slices, slices_of
from autoprune.result.shared_tensors import FILES, SharedTensors
from autoprune.result.trials import Trial
from autoprune.structure.slicing.kept import ATTRIBUTE
from autoprune.structure.slicing.slicing import Edit, build

_NO_MODEL = "build needs the model; load the result with SearchResult.load(path, model=model)"


class Builder(Protocol):
    """Builds the module of a trial."""

    def build(self, trial: Trial) -> nn.Module:
        """Return a plain module that remembers its recipe and shares no state with anything."""
        ...

    def shared(self, trials: Sequence[Trial]) -> SharedTensors | None:
        """Return the tensors that these trials' modules have in common; None where it is not known."""
        ...


@dataclass(frozen=True, eq=False)
class FromEvaluator:
    """Builds the modules that an evaluator scored; holds the context of the search.

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
        module = self.evaluator.build(np.array(trial.candidate, dtype=np.int64))
        return attach(module, self._edit(trial), self.context.model)

    def shared(self, trials: Sequence[Trial]) -> SharedTensors | None:
        """Return the tensors of the model, unless it was pruned before: recipes then refer to the original one."""
        if hasattr(self.context.model, ATTRIBUTE):
            return None
        return SharedTensors(self.context.model, [slices_of(self._edit(trial)) for trial in trials])

    def _edit(self, trial: Trial) -> Edit:
        return self.context.structure.edit(self.context.space.pruning(trial.candidate))


@dataclass(frozen=True)
class WeightsFile:
    """File with the weights of a trial in a saved result.

    Attributes:
        name: Of the file, in the folder of the result.
        sha256: Of its content, so that no other file can be taken for it.
    """

    name: str
    sha256: str


class SavedWeights:
    """Builds from the files next to a saved result.

    Args:
        folder: That of the result.
        model: A dense model of the class that was pruned; None builds nothing.
        files: Files that the result was saved with, by trial.
    """

    def __init__(self, folder: Path, model: nn.Module | None, files: Mapping[int, WeightsFile]) -> None:
        self.folder = folder
        self._model = model
        self.files = files

    def there(self) -> set[int]:
        """Numbers of the trials whose files are in the folder."""
        return {trial for trial, kept in self.files.items() if (self.folder / kept.name).exists()}

    def build(self, trial: Trial) -> nn.Module:
        """Load the trial's weights into a copy of the model.

        Raises:
            FileFormatError: If the result was saved without them, or the file is not the one that it was saved with.
        """
        if self._model is None:
            raise FileFormatError(_NO_MODEL)
        if trial.id not in self.there():
            raise FileFormatError(
                f"trial {trial.id} was saved without weights; choose one of the front, or search again"
            )
        kept = self.files[trial.id]
        file = self.folder / kept.name
        module, digest = read(file, self._model)
        if digest != kept.sha256:
            raise FileFormatError(
                f"{shortened(file)} does not hold the weights that trial {trial.id} was saved with: it was swapped "
                "with another file or replaced; search again, or copy the folder of the result as a whole"
            )
        return module

    def shared(self, trials: Sequence[Trial]) -> SharedTensors | None:
        """Return the dense tensors that the trials are cut from; None without a model, or for one pruned before."""
        if self._model is None or hasattr(self._model, ATTRIBUTE):
            return None
        files = [self.folder / self.files[trial.id].name for trial in trials if trial.id in self.there()]
        dense = build(self._model, Edit({}, {}))
        most_bytes = most_bytes_of(dense)
        for file in self.folder.glob(FILES):
            dense.load_state_dict(read_tensors(file, "dense tensors", most_bytes)[1], strict=False)
        return SharedTensors(dense, [read_slices(file, most_bytes) for file in files])


class FromJournal:
    """Builds nothing: a journal holds no weights."""

    def build(self, trial: Trial) -> nn.Module:
        """Refuse.

        Raises:
            FileFormatError: Always.
        """
        raise FileFormatError(
            f"trial {trial.id} was read from a journal, which holds no weights; resume the search, with resume=True: "
            "what it returns builds modules, and can be saved"
        )

    def shared(self, trials: Sequence[Trial]) -> SharedTensors | None:
        """Return None: nothing is known."""
        return None


def built(builder: Builder | None, trial: Trial) -> nn.Module:
    """Build the module of a trial.

    Raises:
        FileFormatError: If there is nothing to build it from.
    """
    if builder is None:
        raise FileFormatError(_NO_MODEL)
    return builder.build(trial)


def weights_file(folder: Path, trial: Trial) -> Path:
    """Default file for the weights of a trial; another name is taken where it exists already."""
    return folder / f"trial-{trial.id:04d}.safetensors"
