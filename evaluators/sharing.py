"""Shared computation: candidates that agree up to some module compute everything up to there once.

What is kept are outputs of whole modules, for each batch, found again by a digest of everything that the model had read
by then: which slices of which parameters, and which sizes of which modules. A candidate resumes at the last module
whose output is at hand; modules before it return placeholders on the meta device, which hold a shape but no values, so
that a mistake raises instead of scoring wrongly.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.batches import Batch, batch_size, slice_batch
from autoprune.evaluators.cuts import Cut, Flow, NothingToShareError, choose_cuts, flow_of
from autoprune.evaluators.memory import is_out_of_memory
from autoprune.evaluators.protocol import Context
from autoprune.protocols import Failure, IntArray, Measurement
from autoprune.sources import seeded
from autoprune.structure.slicing import Edit, owners

log = logging.getLogger(__name__)

SHARE_BYTES = 2**30
"""Most memory for shared outputs, by default."""

_REMEMBERED = 4096  # digests whose number of uses is remembered
_NEVER = np.iinfo(np.int64).max - 1
_CALIBRATED = 16  # candidates whose calibration is remembered, so that further chunks of data need none
_FEW = 2  # samples of a rehearsal
REHEARSAL = "rehearsal"
WHOLE = ""  # the name of the whole model
PARTS = ("calibration", "validation")
Outcome = Measurement | Failure
Key = tuple[str, bytes, str]
Mark = tuple[int, str, bool]
State = dict[tuple[str, str], Tensor]


def checked_bytes(share_bytes: int) -> int:
    """The limit on memory that an evaluator was given.

    Raises:
        ValueError: If it is negative.
    """
    if share_bytes < 0:
        raise ValueError(f"share_bytes must be at least 0, which shares nothing, got {share_bytes}")
    return share_bytes


@dataclass
class Kept:
    """What is kept of one cut and one digest, for the batches of one part of the data.

    Attributes:
        room: Memory set aside for the outputs, in bytes.
        nbytes: Memory that they take.
        outputs: Of the module, by index of the batch.
        versions: How often each tensor of these had been written to, by index of the batch.
        shapes: What the skipped modules return, on the meta device, by index of the batch.
        state: Tensors that calibration gave to the modules that are hidden; None until it is through.
    """

    room: int
    nbytes: int = 0
    outputs: dict[int, Any] = field(default_factory=dict)
    versions: dict[int, list[int]] = field(default_factory=dict)
    shapes: dict[int, dict[str, Any]] = field(default_factory=dict)
    state: State | None = None


class Store:
    """Outputs within a limit on memory; the least recently used go first.

    As long as there is room, everything is taken. Then only what was asked for before, or by several candidates that
    were announced together: most outputs belong to one candidate and are never asked for again.

    Args:
        limit: In bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.kept: OrderedDict[Key, Kept] = OrderedDict()
        self._asked: OrderedDict[tuple[str, bytes], int] = OrderedDict()
        self.used = 0
        self.peak = 0

    def find(self, key: Key) -> Kept | None:
        """What is kept, now the most recently used."""
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def ask(self, name: str, digest: bytes) -> None:
        """Take note that a candidate could use the output of a module."""
        self._asked[name, digest] = self._asked.pop((name, digest), 0) + 1
        if len(self._asked) > _REMEMBERED:
            self._asked.popitem(last=False)

    def admit(self, key: Key, nbytes: int, guarded: Set[Key]) -> Kept | None:
        """Set memory aside, at the cost of what was used least recently and is not `guarded`; None without room."""
        wanted = self._asked.get(key[:2], 0) > 1
        while self.used + nbytes > self._limit:
            oldest = next((other for other in self.kept if other not in guarded), None)
            if not wanted or oldest is None or nbytes > self._limit:
                return None
            self.drop(oldest)
        self.kept[key] = Kept(nbytes)
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        return self.kept[key]

    def drop(self, key: Key) -> None:
        """Forget one entry, if it is there."""
        if key in self.kept:
            self.used -= self.kept.pop(key).room

    def clear(self) -> None:
        """Forget all outputs."""
        self.kept.clear()
        self.used = 0


@dataclass
class _Candidate:
    """The candidate that is being scored.

    Attributes:
        digests: Of what the model has read by the end of each cut, by the name of the cut.
        known: What the calibration gave this very candidate before, if that is known.
        before: The tensors before the calibration, and how often each had been written to; None without one.
        resumed: The cut that the calibration resumes at.
        touched: What is used or filled, which must not be evicted.
        refused: What found no room.
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
        cut: Where it resumes; None to run everything.
        kept: What is kept there.
        shapes: What modules have returned so far, on the meta device.
        called: Modules called so far.
        rehearsed: What a rehearsal has kept so far, by the name of the cut.
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
    """Runs candidates cut from one skeleton, resuming where an earlier one has been.

    Every cut is rehearsed on the dense model. The first score that comes out of a resumed pass is computed once more
    without, and so is whatever fails. Where anything differs, nothing is shared any more, with a warning.

    Args:
        context: With the dense model.
        module: The skeleton that candidates are cut from; the calls of its modules are intercepted.
        memory_bytes: Most memory for outputs; statistics, a few values a channel, are not counted.
    """

    def __init__(self, context: Context, module: nn.Module, memory_bytes: int) -> None:
        self._context, self._module = context, module
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
        self.on, self.proven, self._resumed = bool(self.cuts), False, False
        self._active = False
        self._now: _Candidate | None = None
        self._pass: _Pass | None = None
        for name in self._watched:
            part = module.get_submodule(name)
            # Whole calls, hooks included: those that take statistics must not see placeholders.
            part._call_impl = partial(self._call, name, part._call_impl)  # type: ignore[method-assign]
        if self.on:
            with seeded(0):
                self._rehearse()

    def order(self, edits: Sequence[Edit]) -> list[int]:
        """The order in which candidates share most with the one before, as positions; takes note of what they share."""
        digests = [self._digests(edit) for edit in edits]
        for each in digests:
            for cut in self.cuts:
                self.store.ask(cut.name, each[cut.name])
        return sorted(range(len(edits)), key=lambda i: (*digests[i].values(), i))

    def score(self, measure: Callable[[], Outcome]) -> Outcome:
        """Run what scores a candidate, with sharing as long as that is known to change nothing."""
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
        """Say which candidate the skeleton is now."""
        if self._active:
            digests = self._digests(edit)
            self._now = _Candidate(digests, self._calibrated.get(digests[WHOLE]))

    def settle(self) -> None:
        """Say that the candidate is calibrated: modules that did not run get what an earlier calibration gave them."""
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
        """Run a model on a batch, from where an earlier candidate has been if it is the skeleton.

        Where memory runs out, sharing ends: what is kept may be why, and a batch that is divided cannot resume.
        """
        try:
            return self._forward(module, batch)
        except Exception as error:
            if self._now is None or not is_out_of_memory(error):
                raise
            self._stop("memory ran out")
            if not self._resumed:
                raise
        raise RuntimeError("a shared evaluation has to begin anew")

    def _forward(self, module: nn.Module, batch: Batch) -> Any:
        now, place = self._now, self._places.get(id(batch))
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
        self._resumed |= found is not None  # before it runs: a placeholder may raise on the way to the cut
        cut, kept = found or (None, None)
        shapes = {} if kept is None else dict(kept.shapes[index])
        return self._run(_Pass(part, index, batch_size(batch), cut, kept, shapes), batch)

    def _lay_out(self, memory_bytes: int) -> tuple[tuple[Cut, ...], list[Mark]]:
        """Find the cuts, and when what candidates change matters first; nothing where nothing can be shared."""
        context, subsets = self._context, self._context.subsets
        if not memory_bytes:
            return (), []
        try:
            if context.structure.device != "meta":
                raise NothingToShareError("the forward pass needs real values")
            flow = flow_of(context.model, [*subsets.calibration, *subsets.validation], context.forward)
            firsts = _firsts(context, flow)
        except Exception as error:  # a fault of the model shows again when a candidate is scored
            log.info("candidates share no computation: %s", error)
            return (), []
        return choose_cuts(flow, firsts, sum(self._samples.values()), memory_bytes), _marks(context, flow)

    @torch.no_grad()
    def _rehearse(self) -> None:
        """Resume the dense model at every cut, on a few samples: a dependence that no trace shows must show here."""
        batch = slice_batch(self._context.subsets.validation[0], 0, _FEW)
        whole = _Pass(REHEARSAL, 0, 0, None, None, {})
        try:
            expected = _tensors(self._run(whole, batch))
            for cut in self.cuts:
                kept = whole.rehearsed[cut.name]
                found = _tensors(self._run(_Pass(REHEARSAL, 0, 0, cut, kept, dict(kept.shapes[0])), batch))
                if len(found) != len(expected) or not all(map(torch.equal, found, expected)):
                    return self._stop(f"outputs differ when the model resumes behind {cut.name}")
        except Exception as error:  # the model cannot be resumed, whatever the reason
            self._stop(f"{type(error).__name__}: {error}")

    def _run(self, run: _Pass, batch: Batch) -> Any:
        """One forward pass of the skeleton."""
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

    def _digests(self, edit: Edit) -> dict[str, bytes]:
        """For each cut a digest of what the candidate reads up to there, and one of all that it is."""
        digests, digest, ends = {}, hashlib.blake2b(digest_size=16), [(cut.name, cut.end) for cut in self.cuts]
        marks = iter(self._marks)
        mark = next(marks, None)
        for cut, end in (*ends, (WHOLE, _NEVER + 1)):
            while mark is not None and mark[0] < end:
                _describe(edit, mark[1], mark[2], digest.update)
                mark = next(marks, None)
            digests[cut] = digest.digest()
        return digests

    def _find(self, now: _Candidate, part: str, index: int | None) -> tuple[Cut, Kept] | None:
        """The last cut whose output is at hand: for one batch, or for a whole calibration."""
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
            run.shapes[name] = tree_map(_shape, outputs)
        if name in self._by_name:
            self._keep(run, self._by_name[name], outputs)
        return outputs

    def _serve(self, run: _Pass, cut: Cut, kept: Kept) -> Any:
        outputs = kept.outputs[run.index]
        if _versions(outputs) != kept.versions[run.index]:
            self._stop(f"the outputs of {cut.name} were written to")
            raise RuntimeError(f"the outputs of {cut.name} were written to")
        run.shapes[cut.name] = tree_map(_shape, outputs)
        return tree_map(_copy, outputs) if cut.overwritten else outputs

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
        nbytes, kept = _nbytes(outputs), self.store.find(key)
        if kept is None:
            room = -(-nbytes * self._samples[run.part] // run.samples)
            kept = self.store.admit(key, room, now.touched)
        if kept is None or kept.nbytes + nbytes > kept.room or any(t.requires_grad for t in _tensors(outputs)):
            self.store.drop(key)
            now.refused.add(key)
            return
        now.touched.add(key)
        if run.index not in kept.outputs:
            kept.nbytes += nbytes
            self._fill(run, cut, kept, outputs)

    def _fill(self, run: _Pass, cut: Cut, kept: Kept, outputs: Any) -> None:
        kept.outputs[run.index] = outputs = tree_map(_copy, outputs) if cut.overwritten else outputs
        kept.versions[run.index] = _versions(outputs)
        kept.shapes[run.index] = {name: run.shapes[name] for name in cut.skipped}

    def _stop(self, reason: str) -> None:
        if not self.on:
            return
        log.warning("candidates share no computation from here on: %s", reason)
        self.on = self._active = False
        self._now = None
        self.store.clear()


def _firsts(context: Context, flow: Flow) -> IntArray:
    """The first operation that each dimension changes, shape (d,)."""
    sizes = context.space.sizes
    candidates = np.vstack([np.zeros_like(sizes), np.diag(sizes - 1)])
    dense, *changed = (context.structure.edit(context.space.pruning(c)) for c in candidates.tolist())
    firsts = []
    for edit in changed:
        places = [flow.reads.get(name, _NEVER) for name in {*edit.slices, *edit.zeroed}]
        for name, values in edit.attributes.items():
            if values != dense.attributes.get(name):
                places.append(flow.enters.get(name, 0))
        firsts.append(min(places, default=_NEVER))
    return np.array(firsts, dtype=np.int64)


def _marks(context: Context, flow: Flow) -> list[Mark]:
    """When what candidates may change matters first: operation, name, and whether it is a tensor or a module."""
    structure = context.structure
    tensors = ((flow.reads.get(name, _NEVER), name, True) for name in {*structure.units_of, *structure.weights})
    modules = ((flow.enters.get(name, -1), name, False) for name in {each.module for each in structure.attributes})
    return sorted([*tensors, *modules])


def _describe(edit: Edit, name: str, tensor: bool, write: Callable[[bytes], None]) -> None:
    """Write down what an edit does to a tensor or a module."""
    if not tensor:
        write(repr((name, sorted(edit.attributes.get(name, {}).items()))).encode())
    elif name in edit.slices or name in edit.zeroed:
        write(repr((name, edit.zeroed.get(name, 0))).encode())
        for dim, index in sorted(edit.slices.get(name, {}).items()):
            write(repr((dim, len(index))).encode())
            write(index.tobytes())


def _same(a: Outcome, b: Outcome) -> bool:
    if isinstance(a, Failure) or isinstance(b, Failure):
        return False
    pairs = ((a.signal, b.signal), (a.metric, b.metric), (a.distortion, b.distortion))
    return all(np.array_equal(x, y) for x, y in pairs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _nbytes(tree: Any) -> int:
    """Memory that is kept alive, once for each storage."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(tree)}.values())


def _versions(tree: Any) -> list[int]:
    return [tensor._version for tensor in _tensors(tree)]


def _shape(leaf: Any) -> Any:
    """A tensor without values in the place of one."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
