"""Cache entries of one candidate: where a pass of it can resume, and what is kept of its passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoprune.evaluators.activation_cache.passes import CALIBRATION, Pass, Place, Resume
from autoprune.evaluators.activation_cache.plan import Plan
from autoprune.evaluators.activation_cache.resume_points import Cut
from autoprune.evaluators.activation_cache.store import Key, State, Store, nbytes, tensors


class Entries:
    """Finds and fills the cache entries of one candidate.

    Args:
        store: Of all candidates.
        plan: The resume points.
        samples: Number of samples of each part of the data.
        digests: Of everything that the model has read up to each cut, by the name of the cut.
    """

    def __init__(self, store: Store, plan: Plan, samples: Mapping[str, int], digests: Mapping[str, bytes]) -> None:
        self._store, self._plan = store, plan
        self._samples, self._digests = samples, digests
        self._touched: set[Key] = set()  # in use or being filled, and not to be evicted
        self._refused: set[Key] = set()  # found no room

    def last_for_batch(self, place: Place) -> Resume | None:
        """Last cut whose output is cached for a batch."""
        return self._last(place.part, place.index)

    def last_for_calibration(self) -> Resume | None:
        """Last cut whose outputs are cached for a whole calibration, with what that left in the modules before it."""
        return self._last(CALIBRATION, None)

    def keep(self, run: Pass, cut: Cut, outputs: Any) -> None:
        """Keep the outputs of a cut that a pass has computed, if there is room."""
        part = run.place.part
        key = self._key(cut, part)
        if key in self._refused or any(name not in run.shapes for name in cut.skipped):
            return
        size = nbytes(outputs)
        kept = self._store.find(key)
        if kept is None:
            room = -(-size * self._samples[part] // run.place.samples)
            kept = self._store.admit(key, room, self._touched)
        if kept is None or kept.nbytes + size > kept.room or any(t.requires_grad for t in tensors(outputs)):
            self._store.drop(key)
            self._refused.add(key)
            return
        self._touched.add(key)
        if run.place.index not in kept.outputs:
            kept.nbytes += size
            run.fill(kept, cut, outputs)

    def complete(self, state: State, batches: int) -> None:
        """Add what a calibration left in the modules to its entries; entries without all batches are dropped."""
        for cut in self._plan.cuts:
            key = self._key(cut, CALIBRATION)
            kept = self._store.find(key)
            if kept is None or kept.state is not None:
                continue
            if len(kept.outputs) == batches:
                kept.state = {place: tensor for place, tensor in state.items() if place[0] in cut.hidden}
            else:
                self._store.drop(key)

    def _last(self, part: str, index: int | None) -> Resume | None:
        best: Resume | None = None
        for cut in self._plan.cuts:
            key = self._key(cut, part)
            kept = self._store.find(key)
            ready = kept is not None and (kept.state is not None if index is None else index in kept.outputs)
            if kept is not None and ready:
                self._touched.add(key)
                if best is None or cut.macs > best[0].macs:
                    best = cut, kept
        return best

    def _key(self, cut: Cut, part: str) -> Key:
        return cut.name, self._digests[cut.name], part
