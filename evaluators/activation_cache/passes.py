"""Forward passes that resume: a skipped module returns a placeholder, the resume point its cached output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from autoprune.data.batch import Batch, Forward
from autoprune.evaluators.activation_cache.plan import Plan
from autoprune.evaluators.activation_cache.resume_points import Cut
from autoprune.evaluators.activation_cache.store import Kept, copied, placeholder, versions
from autoprune.structure.branches.branch import inside
from autoprune.structure.tracing.special_methods import overridden, subclass_of

CALIBRATION = "calibration"
VALIDATION = "validation"
Call = Callable[[], Any]
Resume = tuple[Cut, Kept]


class CannotResumeError(RuntimeError):
    """Raised where a pass did not do what its trace foresaw, so that its outputs cannot be relied on."""


@dataclass(frozen=True)
class Place:
    """Place of a batch in the data of a search.

    Attributes:
        part: `CALIBRATION` or `VALIDATION`.
        index: Of the batch in that part.
        samples: Of the batch.
    """

    part: str
    index: int
    samples: int


class Pass:
    """One forward pass of a batch.

    Args:
        plan: Of the model.
        place: Of the batch.
        resume: Cut that the pass resumes at, and its cache entry; None to run everything.
        computed: Called with this pass, every cut that it computes, and the outputs there.
        dropped: Modules that the model leaves out, and which nothing calls.

    Attributes:
        place: As above.
        shapes: Outputs of skippable modules so far, on the meta device, by name.
        fault: Reason why its outputs cannot be relied on, once it is found.
    """

    def __init__(
        self,
        plan: Plan,
        place: Place,
        resume: Resume | None,
        computed: Callable[[Pass, Cut, Any], None],
        dropped: Collection[str] = (),
    ) -> None:
        self._plan, self._resume, self._computed = plan, resume, computed
        self._dropped = dropped
        self.place = place
        self.shapes: dict[str, Any] = {} if resume is None else dict(resume[1].shapes[place.index])
        self.fault: str | None = None
        self._called: list[str] = []

    def call(self, name: str, call: Call) -> Any:
        """Run a watched module, or return what stands for its outputs.

        Raises:
            CannotResumeError: If the cached outputs have been written to.
        """
        self._called.append(name)
        if self._resume is not None:
            cut, kept = self._resume
            if name == cut.name:
                return self._cached(cut, kept)
            if name in cut.skipped:
                return self.shapes[name]
        outputs = call()
        if name in self._plan.skippable:
            self.shapes[name] = tree_map(placeholder, outputs)
        if name in self._plan.by_name:
            self._computed(self, self._plan.by_name[name], outputs)
        return outputs

    def check(self) -> None:
        """Note a fault if the pass, now complete, called modules in another way than the trace did."""
        if self._plan.calls:
            if self._called != self._foreseen():
                self.fault = self.fault or "modules are not called in the order that was traced"
            return
        planned = self._plan.watched if self._resume is None else {self._resume[0].name, *self._resume[0].skipped}
        expected = {name for name in planned if not any(inside(name, gone) for gone in self._dropped)}
        if Counter(name for name in self._called if name in expected) != Counter(expected):
            self.fault = self.fault or "modules are not called in the way that was traced"

    def _foreseen(self) -> list[str]:
        """Watched modules in the order of the trace, without those inside of modules that are skipped or left out."""
        order = [name for name in self._plan.calls if name in self._plan.watched]
        order = [name for name in order if not any(inside(name, gone) for gone in self._dropped)]
        if self._resume is None:
            return order
        cut = self._resume[0]
        return [name for name in order if name not in cut.hidden or name in cut.skipped or name == cut.name]

    def fill(self, kept: Kept, cut: Cut, outputs: Any) -> None:
        """Put the outputs of a cut into a cache entry."""
        index = self.place.index
        kept.outputs[index] = outputs = tree_map(copied, outputs) if cut.overwritten else outputs
        kept.versions[index] = versions(outputs)
        kept.shapes[index] = {name: self.shapes[name] for name in cut.skipped if name in self.shapes}

    def _cached(self, cut: Cut, kept: Kept) -> Any:
        outputs = kept.outputs[self.place.index]
        if versions(outputs) != kept.versions[self.place.index]:
            self.fault = f"the outputs of {cut.name} were written to"
            raise CannotResumeError(self.fault)
        self.shapes[cut.name] = tree_map(placeholder, outputs)
        return tree_map(copied, outputs) if cut.overwritten else outputs


class Resumable:
    """Model whose passes may resume; the skeleton that candidates are cut from.

    Args:
        module: The model; its calls are intercepted during a pass only, and no other thread runs it then.
        forward: Runs a model on a batch.
        watched: Names of the modules whose calls are intercepted.
    """

    def __init__(self, module: nn.Module, forward: Forward, watched: frozenset[str]) -> None:
        self.module = module
        self.forward = forward
        self._parts = {name: module.get_submodule(name) for name in sorted(watched)}
        self._names = {id(part): name for name, part in self._parts.items()}
        self._kinds: dict[type, type] = {}
        self._pass: Pass | None = None

    def plain(self, batch: Batch) -> Any:
        """Run the model on a batch, all of it and nothing intercepted."""
        return self.forward(self.module, batch)

    def run(self, own: Pass, batch: Batch) -> Any:
        """Run a pass on a batch; its `Pass.fault` says afterwards whether the outputs can be relied on."""
        with self._intercepted(own):
            outputs = self.forward(self.module, batch)
        own.check()
        return outputs

    @contextmanager
    def _intercepted(self, own: Pass) -> Iterator[None]:
        """Hand the calls of watched modules to a pass.

        Whole calls, hooks included: hooks that take statistics must not see placeholders. No hook can stand in for a
        call, so the modules get a subclass of their class.
        """
        self._pass = own
        try:
            with overridden(self._parts.values(), self._subclass):
                yield
        finally:
            self._pass = None

    def _subclass(self, kind: type) -> type:
        if kind not in self._kinds:
            inherited: Any = kind.__call__

            def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807  # the method of that name
                call = partial(inherited, module, *args, **kwargs)
                name = self._names.get(id(module))  # None for a copy that the model makes of it
                return call() if name is None or self._pass is None else self._pass.call(name, call)

            self._kinds[kind] = subclass_of(kind, {"__call__": __call__})
        return self._kinds[kind]
