"""Shared computation: candidates that agree up to some module compute everything up to it once.

The cache holds outputs of whole modules, for each batch. Its key is a digest of everything that the model has read
before: the slices of parameters and the sizes of modules. A candidate resumes at the last module whose output is
cached; modules before it return placeholders on the meta device, which hold a shape but no values, so that a mistake
raises instead of scoring wrongly.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autoprune.arguments import said, whole_number
from autoprune.data.batch import Batch, batch_size, pieces
from autoprune.data.sampling import process_state, seeded
from autoprune.evaluators.activation_cache.digests import WHOLE, Mark, digests_of, first_operations, marks_of
from autoprune.evaluators.activation_cache.limits import room_beside
from autoprune.evaluators.activation_cache.resume_points import Cut, NothingToShareError, choose_cuts, flow_of
from autoprune.evaluators.activation_cache.store import (
    Kept,
    Key,
    State,
    Store,
    copied,
    nbytes,
    placeholder,
    tensors,
    versions,
)
from autoprune.evaluators.protocol import Context
from autoprune.evaluators.scoring.out_of_memory import is_out_of_memory
from autoprune.protocols import Failure, Measurement
from autoprune.structure.owners import owners
from autoprune.structure.slicing.slicing import Edit

log = logging.getLogger(__name__)

_CALIBRATED = 16  # candidates whose calibration is remembered, so that further chunks of data need none
_FEW = 2  # samples of a rehearsal
REHEARSAL = "rehearsal"
PARTS = ("calibration", "validation")
Outcome = Measurement | Failure


def checked_bytes(share_bytes: int | None) -> int | None:
    """Check the memory limit given to an evaluator; None for a limit by the size of the model.

    Raises:
        ValueError: If it is negative.
    """
    return None if share_bytes is None else whole_number("share_bytes", share_bytes, 0, why=", which shares nothing")


@dataclass
class _Candidate:
    """Candidate that is being scored.

    Attributes:
        digests: Of everything that the model has read up to each cut, by the name of the cut.
        known: Result of an earlier calibration of this candidate, if there is one.
        before: The tensors before the calibration, and how often each had been written to; None without one.
        resumed: The cut that the calibration resumes at.
        touched: Entries in use or being filled, which must not be evicted.
        refused: Entries that found no room.
    """

    digests: dict[str, bytes]
    known: State | None
    before: dict[tuple[str, str], tuple[Tensor, int]] | None = None
    resumed: tuple[Cut, Kept] | None = None
    touched: set[Key] = field(default_factory=set)
    refused: set[Key] = field(default_factory=set)


@dataclass
class _Pass:
    """One forward pass of a batch.

    Attributes:
        cut: Cut that it resumes at; None to run everything.
        kept: Cache entry of that cut.
        shapes: Outputs of modules so far, on the meta device.
        called: Modules called so far.
        rehearsed: Outputs kept by a rehearsal so far, by the name of the cut.
    """

    part: str
    index: int
    samples: int
    cut: Cut | None
    kept: Kept | None
    shapes: dict[str, Any]
    called: list[str] = field(default_factory=list)
    rehearsed: dict[str, Kept] = field(default_factory=dict)


class Sharing:
    """Runs candidates cut from one skeleton, resuming from the cached outputs of earlier ones.

    Every cut is rehearsed on the dense model. The first score of a resumed pass is computed again without sharing, and
    so is every score that fails. If anything differs, sharing ends with a warning.

    Args:
        context: With the dense model.
        module: The skeleton that candidates are cut from; the calls of its modules are intercepted.
        memory_bytes: Most memory for outputs, by default `room_beside` the model; statistics, a few values a channel,
            are not counted.
    """

    def __init__(self, context: Context, module: nn.Module, memory_bytes: int | None) -> None:
        self._context, self._module = context, module
        memory_bytes = room_beside(context.model) if memory_bytes is None else memory_bytes
        subsets = context.subsets
        self._places = {id(b): (part, i) for part in PARTS for i, b in enumerate(getattr(subsets, part))}
        self._samples = {part: subsets.samples[part] for part in PARTS}
        self.store = Store(memory_bytes)
        self.cuts, self._marks = self._lay_out(memory_bytes)
        self._watched = {name for cut in self.cuts for name in (cut.name, *cut.skipped)}
        self._skippable = {name for cut in self.cuts for name in cut.skipped}
        self._by_name = {cut.name: cut for cut in self.cuts}
        self._holders = [(owner.module, owner.key, owner.holder) for owner in owners(module)]
        self._calibrated: OrderedDict[bytes, State] = OrderedDict()
        self.on = bool(self.cuts)
        self.proven = False
        self._resumed = False
        self._active = False
        self._now: _Candidate | None = None
        self._pass: _Pass | None = None
        for name in self._watched:
            part = module.get_submodule(name)
            # Whole calls, hooks included: hooks that take statistics must not see placeholders.
            part._call_impl = partial(self._call, name, part._call_impl)  # type: ignore[method-assign]  # as said
        if self.on:
            with seeded(0):
                self._rehearse()

    def order(self, edits: Sequence[Edit]) -> list[int]:
        """Return the order in which candidates share most with the one before, as positions; note what they share."""
        digests = [digests_of(edit, self._marks, self.cuts) for edit in edits]
        for each in digests:
            for cut in self.cuts:
                self.store.ask(cut.name, each[cut.name])
        return sorted(range(len(edits)), key=lambda i: (*digests[i].values(), i))

    def score(self, measure: Callable[[], Outcome]) -> Outcome:
        """Run the scoring of a candidate, with sharing unless it was found to change a score."""
        if not self.on:
            return measure()
        self._active, self._resumed = True, False
        try:
            outcome = measure()
        finally:
            self._active, self._now, self._pass = False, None, None
        failed = isinstance(outcome, Failure)
        if not self._resumed or (self.proven and not failed):
            return outcome
        if failed:
            self.store.clear()  # for want of memory, perhaps
        plain = measure()
        if failed and isinstance(plain, Failure):
            return plain
        if _same(outcome, plain):
            self.proven = True
        else:
            self._stop(f"a shared evaluation gave {outcome}, and {plain} without" if failed else "scores differ")
        return plain

    def begin(self, edit: Edit) -> None:
        """Set the candidate that the skeleton now is."""
        if self._active:
            digests = digests_of(edit, self._marks, self.cuts)
            self._now = _Candidate(digests, self._calibrated.get(digests[WHOLE]))

    def settle(self) -> None:
        """Finish the calibration of a candidate: modules that did not run get the values of an earlier calibration."""
        now = self._now
        if now is None or now.before is None:
            return
        if now.known is not None:
            for module, key, holder in self._holders:
                holder[key] = now.known.get((module, key), holder[key])
            return
        found: State = {}
        if now.resumed is not None:
            assert now.resumed[1].state is not None
            found.update(now.resumed[1].state)
        hidden = now.resumed[0].hidden if now.resumed is not None else frozenset()
        for module, key, holder in self._holders:
            if module in hidden:
                if (module, key) in found:
                    holder[key] = found[module, key]
            else:
                old, version = now.before[module, key]
                if holder[key] is not old or old._version != version:
                    found[module, key] = holder[key]
        self._calibrated[now.digests[WHOLE]] = found
        while len(self._calibrated) > _CALIBRATED:
            self._calibrated.popitem(last=False)
        batches = len(self._context.subsets.calibration)
        for cut in self.cuts:
            kept = self.store.find((cut.name, now.digests[cut.name], "calibration"))
            if kept is not None and kept.state is None:
                if len(kept.outputs) == batches:
                    kept.state = {place: tensor for place, tensor in found.items() if place[0] in cut.hidden}
                else:
                    self.store.drop((cut.name, now.digests[cut.name], "calibration"))

    def forward(self, module: nn.Module, batch: Batch) -> Any:
        """Run a model on a batch; the skeleton resumes from the cached output of an earlier candidate.

        Where memory runs out, sharing ends: the cache may be the reason, and a batch that is divided cannot resume.
        """
        try:
            return self._forward(module, batch)
        except Exception as error:  # torch has several types for too little memory; all else is raised again
            if self._now is None or not is_out_of_memory(error):
                raise
            self._stop("memory ran out")
            if not self._resumed:
                raise
        raise RuntimeError("a shared evaluation has to begin anew")

    def _forward(self, module: nn.Module, batch: Batch) -> Any:
        now = self._now
        place = self._places.get(id(batch))
        if now is None or place is None or module is not self._module:
            return self._context.forward(module, batch)
        part, index = place
        if part == "validation":
            found = self._find(now, part, index)
        else:
            if now.before is None:
                now.before = {(m, k): (holder[k], holder[k]._version) for m, k, holder in self._holders}
                now.resumed = self._find(now, part, None) if now.known is None else None
            if now.known is not None:
                self._resumed = True
                return None
            found = now.resumed
        self._resumed |= found is not None  # before it runs: a placeholder may raise before the cut
        cut, kept = found or (None, None)
        shapes = {} if kept is None else dict(kept.shapes[index])
        return self._run(_Pass(part, index, batch_size(batch), cut, kept, shapes), batch)

    def _lay_out(self, memory_bytes: int) -> tuple[tuple[Cut, ...], list[Mark]]:
        """Find the cuts, and the first use of all that candidates change; nothing where sharing is impossible."""
        context = self._context
        subsets = self._context.subsets
        if not memory_bytes:
            return (), []
        try:
            if context.structure.device != "meta":
                raise NothingToShareError("the forward pass needs real values")
            with process_state():  # tracing changes what threads share
                flow = flow_of(context.model, [*subsets.calibration, *subsets.validation], context.forward)
            firsts = first_operations(context, flow)
        except Exception as error:  # a fault of the model shows again when a candidate is scored
            log.info("candidates share no computation: %s", said(error))
            return (), []
        return choose_cuts(flow, firsts, sum(self._samples.values()), memory_bytes), marks_of(context, flow)

    @torch.no_grad()
    def _rehearse(self) -> None:
        """Resume the dense model at every cut, on a few samples, to find dependences that no trace shows."""
        batch = pieces(self._context.subsets.validation[0], _FEW)[0]
        whole = _Pass(REHEARSAL, 0, 0, None, None, {})
        try:
            expected = tensors(self._run(whole, batch))
            for cut in self.cuts:
                kept = whole.rehearsed[cut.name]
                found = tensors(self._run(_Pass(REHEARSAL, 0, 0, cut, kept, dict(kept.shapes[0])), batch))
                if len(found) != len(expected) or not all(map(torch.equal, found, expected)):
                    return self._stop(f"outputs differ when the model resumes behind {cut.name}")
        except Exception as error:  # the model cannot be resumed, whatever the reason
            self._stop(said(error))

    def _run(self, run: _Pass, batch: Batch) -> Any:
        """Run one forward pass of the skeleton."""
        self._pass = run
        try:
            outputs = self._context.forward(self._module, batch)
        finally:
            self._pass = None
        expected = self._watched if run.cut is None else {run.cut.name, *run.cut.skipped}
        if Counter(name for name in run.called if name in expected) != Counter(expected):
            self._stop("modules are not called in the way that was traced")
            if run.cut is not None:
                raise RuntimeError("modules are not called in the way that was traced")
        return outputs

    def _find(self, now: _Candidate, part: str, index: int | None) -> tuple[Cut, Kept] | None:
        """Last cut whose output is cached: for one batch, or for a whole calibration."""
        best = None
        for cut in self.cuts:
            key = (cut.name, now.digests[cut.name], part)
            kept = self.store.find(key)
            ready = kept is not None and (kept.state is not None if index is None else index in kept.outputs)
            if kept is not None and ready:
                now.touched.add(key)
                if best is None or cut.macs > best[0].macs:
                    best = cut, kept
        return best

    def _call(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for the call of a module."""
        run = self._pass
        if run is None:
            return call(*args, **kwargs)
        run.called.append(name)
        if run.cut is not None and run.kept is not None:
            if name == run.cut.name:
                return self._serve(run, run.cut, run.kept)
            if name in run.cut.skipped:
                return run.shapes[name]
        outputs = call(*args, **kwargs)
        if name in self._skippable:
            run.shapes[name] = tree_map(placeholder, outputs)
        if name in self._by_name:
            self._keep(run, self._by_name[name], outputs)
        return outputs

    def _serve(self, run: _Pass, cut: Cut, kept: Kept) -> Any:
        outputs = kept.outputs[run.index]
        if versions(outputs) != kept.versions[run.index]:
            self._stop(f"the outputs of {cut.name} were written to")
            raise RuntimeError(f"the outputs of {cut.name} were written to")
        run.shapes[cut.name] = tree_map(placeholder, outputs)
        return tree_map(copied, outputs) if cut.overwritten else outputs

    def _keep(self, run: _Pass, cut: Cut, outputs: Any) -> None:
        """Keep the output of a cut, if there is room."""
        if run.part == REHEARSAL:
            run.rehearsed[cut.name] = Kept(0)
            self._fill(run, cut, run.rehearsed[cut.name], outputs)
            return
        now = self._now
        assert now is not None
        key = (cut.name, now.digests[cut.name], run.part)
        if key in now.refused or any(name not in run.shapes for name in cut.skipped):
            return
        size = nbytes(outputs)
        kept = self.store.find(key)
        if kept is None:
            room = -(-size * self._samples[run.part] // run.samples)
            kept = self.store.admit(key, room, now.touched)
        if kept is None or kept.nbytes + size > kept.room or any(t.requires_grad for t in tensors(outputs)):
            self.store.drop(key)
            now.refused.add(key)
            return
        now.touched.add(key)
        if run.index not in kept.outputs:
            kept.nbytes += size
            self._fill(run, cut, kept, outputs)

    def _fill(self, run: _Pass, cut: Cut, kept: Kept, outputs: Any) -> None:
        kept.outputs[run.index] = outputs = tree_map(copied, outputs) if cut.overwritten else outputs
        kept.versions[run.index] = versions(outputs)
        kept.shapes[run.index] = {name: run.shapes[name] for name in cut.skipped}

    def _stop(self, reason: str) -> None:
        if not self.on:
            return
        log.warning("candidates share no computation from here on: %s", reason)
        self.on = self._active = False
        self._now = None
        self.store.clear()


def _same(a: Outcome, b: Outcome) -> bool:
    if isinstance(a, Failure) or isinstance(b, Failure):
        return False
    pairs = ((a.signal, b.signal), (a.metric, b.metric), (a.distortion, b.distortion))
    return all(np.array_equal(x, y) for x, y in pairs)
