"""Check that an evaluator of the user's does not change the dense model."""

from __future__ import annotations

from torch import nn


def is_ours(evaluator: object) -> bool:
    """Return whether an evaluator, with its start, belongs to autoprune; others may change anything they get."""
    start = getattr(evaluator, "_start", None)
    own = type(evaluator).__module__.partition(".")[0] == "autoprune"
    return own and (start is None or is_ours(start))


class Untouched:
    """Detects writes to the parameters of a model, by the versions that PyTorch counts, and replaced parameters.

    Writes through NumPy or ``.data`` leave no trace.

    Args:
        model: The dense model of a context.
        evaluator: Evaluator that may write to it; those of autoprune are not checked.
    """

    def __init__(self, model: nn.Module, evaluator: object) -> None:
        self._model = model
        self._name = type(evaluator).__name__
        self._known = {} if is_ours(evaluator) else {name: (p, p._version) for name, p in model.named_parameters()}

    def require(self) -> None:
        """Check that no parameter was changed.

        Raises:
            ValueError: Names the evaluator and the parameter.
        """
        if not self._known:
            return
        now = dict(self._model.named_parameters())
        for name, (before, version) in self._known.items():
            if now.get(name) is not before or before._version != version:
                raise ValueError(
                    f"evaluator must leave the model of its context as it is, but {self._name} changed {name!r}: all "
                    "further scores would be of another model; let it work on copy.deepcopy(context.model)"
                )
