"""Plan of a cache: the resume points whose outputs are kept, and the places where candidates may differ."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from autoprune.arguments import said
from autoprune.data.sampling import process_state
from autoprune.evaluators.activation_cache.digests import WHOLE, Mark, digests_of, first_operations, marks_of
from autoprune.evaluators.activation_cache.flow import flow_of
from autoprune.evaluators.activation_cache.resume_points import Cut, choose_cuts
from autoprune.evaluators.protocol import Context
from autoprune.structure.branches.branch import Branch
from autoprune.structure.slicing.slicing import Edit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Resume points of a model.

    Attributes:
        cuts: Those whose outputs are kept, in the order of the pass; none where sharing is impossible.
        marks: First use of each tensor and module that candidates change.
        branches: Those that candidates may drop.
        calls: Modules in the order in which passes must call them; empty where they cannot but do.
    """

    cuts: tuple[Cut, ...] = ()
    marks: Sequence[Mark] = ()
    branches: Sequence[Branch] = ()
    calls: tuple[str, ...] = ()

    def digests(self, edit: Edit) -> dict[str, bytes]:
        """Digests of what a candidate changes before each cut, see `digests_of`."""
        return digests_of(edit, self.marks, self.cuts, self.branches)

    @cached_property
    def by_name(self) -> dict[str, Cut]:
        """The cuts by the names of their modules."""
        return {cut.name: cut for cut in self.cuts}

    @cached_property
    def skippable(self) -> frozenset[str]:
        """Modules that some cut skips."""
        return frozenset(name for cut in self.cuts for name in cut.skipped)

    @cached_property
    def watched(self) -> frozenset[str]:
        """Modules whose calls are intercepted: where passes may go several ways, all that candidates change, too."""
        named = self.skippable | self.by_name.keys()
        return named | self._changed if self.calls else named

    @cached_property
    def _changed(self) -> frozenset[str]:
        return frozenset(name.rpartition(".")[0] if tensor else name for _, name, tensor in self.marks) - {WHOLE}


def plan_of(context: Context, memory_bytes: int) -> Plan:
    """Choose the resume points of the dense model; the plan is empty where sharing is impossible, which the log says.

    Args:
        context: With the dense model, which stays as it is.
        memory_bytes: Most memory for outputs.
    """
    subsets = context.subsets
    if not memory_bytes:
        return Plan()
    try:
        with process_state():  # tracing changes what threads share
            flow = flow_of(context.model, [*subsets.calibration, *subsets.validation], context.forward)
        firsts = first_operations(context, flow)
    except Exception as error:  # a fault of the model shows again when a candidate is scored
        log.info("candidates share no computation: %s", said(error))
        return Plan()
    samples = subsets.samples["calibration"] + subsets.samples["validation"]
    cuts = choose_cuts(flow, firsts, samples, memory_bytes)
    return Plan(cuts, marks_of(context, flow), context.structure.branches, flow.calls)
