"""Analysis of a model on example inputs: trace, propagate, find units, and check the `Structure`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from autoprune.arguments import one_of, said
from autoprune.data.sampling import seeded
from autoprune.errors import AutopruneError, DataError, NothingToPruneError, StructureCheckError, UnsupportedModelError
from autoprune.imports import import_late_ones
from autoprune.structure.branches.check import with_branches
from autoprune.structure.checks.checks import Checker
from autoprune.structure.checks.isolated import ProcessDiedError, call_alone
from autoprune.structure.containers import map_tensors, sizes_of, tensors_in
from autoprune.structure.example import Example
from autoprune.structure.labels import Propagation
from autoprune.structure.propagate import propagate
from autoprune.structure.rewriting.rewrite import find_rewrites, rewritten
from autoprune.structure.slicing.slicing import Edit, build
from autoprune.structure.structure import Structure, assemble
from autoprune.structure.time_limit import doing, limited
from autoprune.structure.tracing.known_shapes import shapes_kept
from autoprune.structure.tracing.record import Record
from autoprune.structure.tracing.trace import trace
from autoprune.structure.units import Units, find_units

SITES_TRIED = 32
"""Most ambiguous sites that are changed one by one; if there are more, only similar ones together."""

_PREPARED = (".fake_quantize", "quantization.observer", ".qat")
"""Parts of the names of Python modules whose classes occur in a model that is prepared for quantisation."""

MOST_KEPT = 0.9
"""Share of the prunable parameters of evaluation that must stay prunable for training to be followed."""


ChecksMode = Literal["on", "strict", "isolated"]
RewriteMode = Literal["auto", "off"]


def analyse(
    example: Example,
    *,
    checks: str = "on",
    rewrite: str = "auto",
    seed: int = 0,
    until: float | None = None,
) -> Structure:
    """Find the units that can be removed from a model, and check them.

    Args:
        example: Any module with inputs that it runs on, which are moved to its device; it comes back unchanged. A group
            must be prunable in every call; costs are those of the first.
        checks: ``"on"`` freezes a group that fails a check; ``"strict"`` raises instead; ``"isolated"`` is ``"on"`` in
            a separate process, which a wrong slice may kill without harm.
        rewrite: ``"auto"`` delivers modules whose code does not follow the widths as graphs of their operations;
            ``"off"`` freezes the groups that they stop.
        seed: Draws the units that the checks remove.
        until: Deadline, by `time.monotonic`; None for none. It is checked between operations.

    Raises:
        UnsupportedModelError: If the model is scripted, quantised, spread over devices, or cannot be copied.
        StructureCheckError: If a group fails and `checks` is ``"strict"``, or the process of ``"isolated"`` dies.
        TimeoutError: If it took longer than `until`; names the step that was running.
        ValueError: If the model returns NaN or infinity for the inputs, or `checks` or `rewrite` is unknown.
    """
    one_of("checks", checks, get_args(ChecksMode))
    one_of("rewrite", rewrite, get_args(RewriteMode))
    import_late_ones()
    device = require_supported(example.model)
    if checks == "isolated":
        return _isolated(example, {"rewrite": rewrite, "seed": seed, "until": until})
    with limited(until), shapes_kept():
        return _analysed(example.on(device), checks, rewrite, seed)


def _analysed(example: Example, checks: str, rewrite: str, seed: int) -> Structure:
    with seeded(seed), torch.inference_mode(False):  # inference mode would record layers that are not decomposed
        doing("the forward pass was traced")
        try:
            record = trace(example, training=True)
            flow = _followed(record)
            record = flow.record
            ran = (*record.ops, *record.training)
            read = {record.values[value].name for op in ran for value in op.inputs()}
            untouched = tuple(name for name, _ in example.model.named_parameters() if name not in read)
            checker = Checker(flow, example, untouched, seed)
            dense = checker.values.dense
        except Exception:  # of the user's code: if it also raises without tracing, the inputs are to blame
            _require_runs(example)
            raise
        if not any(out.numel() for out in dense):
            raise UnsupportedModelError(
                "model must return at least one value, got tensors of "
                f"{sizes_of(dense)}; has it a layer of no outputs, or the example no samples?"
            )
        if not all(torch.isfinite(out).all() for out in dense if out.is_floating_point()):
            raise ValueError(
                "model must return finite outputs for the example inputs, got NaN or infinity; "
                "check its weights and pass as example= what looks like real data"
            )
        doing("it was found out how far the code follows smaller widths")
        graphs = find_rewrites(checker) if rewrite == "auto" else {}
        if graphs:
            checker = checker.on(rewritten(example.model, graphs), graphs)
        doing(f"smaller models were compared with the dense one, of {len(find_units(flow).groups)} groups in all")
        failures = checker.failures()
    if failures and checks == "strict":
        details = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise StructureCheckError(f"checks='strict' and {len(failures)} groups failed: {details}")
    units = find_units(flow, failures)
    structure = assemble(flow, units, untouched, checker.sizes.attributes)
    with seeded(seed), torch.inference_mode(False):
        untrained = record.untrained or checker.misfit_in_training(units, structure)
        doing("smaller models without some residual branches were compared with the dense one")
        structure = with_branches(structure, units, failures, checker)
    return replace(structure, graphs=graphs, untrained=untrained)


def _require_runs(example: Example) -> None:
    """Run the model, without tracing, in every call.

    Raises:
        DataError: If it raises for these inputs too; names them.
    """
    for args, kwargs in example.inputs:
        private = map_tensors(lambda tensor: tensor.clone(), (args, dict(kwargs)))
        try:
            with torch.no_grad():
                example.forward(build(example.model, Edit({}, {})).eval(), *private[0], **private[1])
        except AutopruneError:
            raise
        except Exception as error:  # the user's forward may raise anything
            raise DataError(
                f"the model's forward must run on the data, or the example, but with tensors of "
                f"{sizes_of(tensors_in((args, kwargs), objects=True))} it raises {said(error)}; give inputs that it "
                "takes, or autoprune.Call(forward=...)"
            ) from error


def _followed(record: Record) -> Propagation:
    """Propagate labels over evaluation and the additional operations of training, unless these freeze much of it."""
    flow, units = best_choices(record)
    if not (record.training or record.training_ends):
        return flow
    alone = replace(record, training=[], twins={}, trained=[], training_ends=[])
    evaluated, reached = best_choices(alone)
    if covered(flow, units)[0] >= MOST_KEPT * covered(evaluated, reached)[0]:
        return flow
    stays = next((freeze.reason for freeze in flow.freezes if freeze.op >= len(record.ops)), "it returns more")
    alone.untrained = f"to follow it would keep most of the model as it is: {stays}"
    return evaluated


def _isolated(example: Example, settings: dict[str, Any]) -> Structure:
    try:
        return call_alone(_analyse_alone, torch.get_num_threads(), example, settings)
    except ProcessDiedError as error:
        raise StructureCheckError(
            "checks='isolated' and the model's forward killed its process on a sliced copy, in a native kernel for "
            "example; leave modules out with autoprune.Call(outputs=...), or run with checks='on' to see where"
        ) from error


def _analyse_alone(threads: int, example: Example, settings: dict[str, Any]) -> Structure:
    torch.set_num_threads(threads)
    return analyse(example, **settings)


def require_supported(model: nn.Module) -> torch.device:
    """Return the one device of a model that can be sliced.

    Raises:
        UnsupportedModelError: If it is scripted, quantised, uninitialised, or on several devices.
    """
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "model"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"model must be an ordinary nn.Module, but {where} is a ScriptModule ({type(module).__name__}); "
                "pass the module that was scripted or traced"
            )
        if ".quantized" in type(module).__module__ or hasattr(module, "_packed_params"):
            raise UnsupportedModelError(
                f"model must not be quantised, but {where} is {type(module).__name__}; prune first, then quantise"
            )
        for kind in type(module).__mro__:
            if any(part in kind.__module__ for part in _PREPARED):
                raise UnsupportedModelError(
                    f"model must not be prepared for quantisation, but {where} is a {kind.__name__} of "
                    f"{kind.__module__}; prune first, prepare afterwards"
                )
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)):
            raise UnsupportedModelError(f"model has an uninitialised parameter {name!r}; run it once on real data")
        if tensor.layout is not torch.strided:
            raise UnsupportedModelError(f"model must be dense, but {name!r} is {tensor.layout}; call .to_dense() on it")
        if tensor.is_inference():
            raise UnsupportedModelError(
                f"model must hold ordinary tensors, but {name!r} was made under torch.inference_mode(); build or load "
                "the model outside of it, or pass copy.deepcopy(model)"
            )
        if tensor.is_quantized:
            raise UnsupportedModelError(f"model must not be quantised, but {name!r} is; prune first, then quantise")
    if devices == {torch.device("meta")}:
        raise UnsupportedModelError("model must hold values, but it is on the meta device; load its weights first")
    if len(devices) > 1:
        names = sorted(str(device) for device in devices)
        raise UnsupportedModelError(f"model must be on one device, got {names}; call model.to(device) first")
    return devices.pop() if devices else torch.device("cpu")


def best_choices(record: Record) -> tuple[Propagation, Units]:
    """Propagate labels, trying other choices at ambiguous sites while more parameters become prunable.

    All sites change together first, then those of one operation, because a shuffle needs them all; then those of equal
    shapes, as in repeated blocks; then, where there are few, each alone.
    """
    best = propagate(record)
    units = find_units(best)
    score = covered(best, units)
    tried = {frozenset(best.sites.items())}
    for sites in _site_sets(best):
        for choice in range(max(best.factors.get(site, 0) for site in sites)):
            # A site may appear or vanish with the choices at others.
            changed = {site: choice for site in sites if best.sites.get(site, choice) != choice < best.factors[site]}
            choices = {**best.sites, **changed}
            if frozenset(choices.items()) not in tried:  # else an operation, a form or a site alone makes a set again
                tried.add(frozenset(choices.items()))
                flow = propagate(record, choices)
                found = find_units(flow)
                if (more := covered(flow, found)) > score:
                    best, units, score = flow, found, more
                    tried.add(frozenset(best.sites.items()))
    return best, units


def _site_sets(flow: Propagation) -> list[list[int]]:
    by_rule: dict[str, list[int]] = {}
    by_shape: dict[tuple[object, ...], list[int]] = {}
    for site in flow.sites:
        op = flow.record.op(site)
        shapes = tuple(flow.record.values[value].shape for value in (*op.inputs(), *op.results()))
        by_rule.setdefault(op.name, []).append(site)
        by_shape.setdefault((op.name, *shapes), []).append(site)
    alone = [[site] for site in flow.sites] if len(flow.sites) <= SITES_TRIED else []
    sets = [*([list(flow.sites)] if flow.sites else []), *by_rule.values(), *by_shape.values(), *alone]
    return [sites for i, sites in enumerate(sets) if sites not in sets[:i]]


def covered(flow: Propagation, units: Units) -> tuple[int, int]:
    """Count the parameters in a group, each dimension separately; then the number of units.

    It counts coverage, not the parameters that could be removed, because these would prefer the finer units inside
    attention heads to the heads, and so change the scale of their products.
    """
    shapes = {value.name: value.shape for value in flow.record.values if value.kind == "parameter"}
    total = 0
    for group in units.groups:
        for slot in group.slots:
            if slot.tensor in shapes:
                shape = shapes[slot.tensor]
                total += slot.indices.size * int(torch.Size(shape).numel()) // shape[slot.dim]
    return total, len(units.group_of)


def require_prunable(structure: Structure) -> None:
    """Refuse a structure without groups.

    Raises:
        NothingToPruneError: Lists the frozen parts with the reasons.
    """
    if structure.groups:
        return
    reasons: dict[str, int] = {}
    for frozen in structure.frozen:
        reasons[frozen.reason] = reasons.get(frozen.reason, 0) + 1
    why = "; ".join(f"{reason} ({count} dimensions)" for reason, count in list(reasons.items())[:5])
    raise NothingToPruneError(f"model has nothing to prune: {why or 'it has no parameters that its forward reads'}")
