"""Mutants of the source: the modules, each named once, and in each the change that tests should notice."""

from __future__ import annotations

from dataclasses import dataclass

CHANNELS = "autoprune.search_spaces.channels"
PROBLEM = "autoprune.optimizers.problem"
MODEL_FILE = "autoprune.result.recipe"
PARETO = "autoprune.pareto"
PROMOTION = "autoprune.study.promotion"
RACING = "autoprune.early_stopping.racing"
REPAIR = "autoprune.optimizers.repair"
RESULT_FOLDER = "autoprune.result.saving"
RIVALS = "autoprune.study.rivals"
RULES = "autoprune.structure.rules"
RUNGS = "autoprune.early_stopping.successive_halving"
SPARSITY = "autoprune.search_spaces.sparsity"
STATISTICS = "autoprune.metrics.statistics"
STOPPING = "autoprune.study.convergence"
TENSOR_FILE = "autoprune.files.tensor_file"


@dataclass(frozen=True)
class Mutant:
    """One change of the source.

    Attributes:
        module: Dotted name of the module that is changed.
        old: Text that stands in it exactly once.
        new: Text that takes its place.
        tests: Test files that should fail, by their name without the ending; ``file::Class`` for a part of one.
        mistake: The mistake, in words.
    """

    module: str
    old: str
    new: str
    tests: tuple[str, ...]
    mistake: str


MUTANTS = (
    # Racing: what is bet, who is spared, and what an evaluation that ended early reports.
    Mutant(
        RACING,
        "left = total - np.arange(n)",
        "left = total - 1 - np.arange(n)",
        ("test_racing::TestTheTest",),
        "samples left, off by one",
    ),
    Mutant(
        RACING,
        "if self.direction.better(gained, 0.0) or signal.min() < self.floor - _SLACK:",
        "if self.direction.better(gained, 0.0):",
        ("test_racing::TestOneRace",),
        "signals below the floor do not end the test",
    ),
    Mutant(
        RACING,
        "self.direction.better(gained, 0.0)",
        "gained > 0",
        ("test_racing::TestOneRace",),
        "the direction of the metric is ignored",
    ),
    Mutant(
        RACING,
        "(2 * _FIRST_BLOCK * 4**block)",
        "(2 * _FIRST_BLOCK * 2**block)",
        ("test_racing::TestTheTest",),
        "shares of the error that do not sum to it",
    ),
    Mutant(
        RACING,
        "if seen < total and race.lost(",
        "if race.lost(",
        ("test_racing::TestASearch",),
        "a candidate is dropped after its last sample",
    ),
    Mutant(
        RACING,
        "replace(part, seconds=part.seconds + sum(before.seconds for before in parts))",
        "replace(part, seconds=part.seconds)",
        ("test_racing::TestOneRace",),
        "seconds of earlier batches are lost",
    ),
    Mutant(
        RACING,
        "np.maximum.accumulate(known[..., ::-1], axis=-1)[..., ::-1]",
        "np.maximum.accumulate(known, axis=-1)",
        ("test_racing::TestTheTest",),
        "the largest known value of the samples seen, not of those left",
    ),
    # Rungs: who is behind, who may pass, and against whom.
    Mutant(
        RUNGS,
        "if outcome.signal.mean() > rung.bar:",
        "if outcome.signal.mean() >= rung.bar:",
        ("test_rungs::TestOneLadder",),
        "a tie is stopped",
    ),
    Mutant(
        RUNGS,
        "math.ceil((len(objectives) + 1) / reduction)",
        "math.ceil(len(objectives) / reduction)",
        ("test_rungs::TestWhoIsBehind",),
        "the candidate to come is not counted",
    ),
    Mutant(
        RUNGS,
        "if room <= 0:",
        "if room < 0:",
        ("test_rungs::TestWhoIsBehind",),
        "one front too many counts as the best",
    ),
    Mutant(
        PROMOTION,
        "holds & (known <= cost).all(axis=1) & ~probe",
        "holds & (known < cost).all(axis=1) & ~probe",
        ("test_rungs",),
        "rivals of the same cost are left out",
    ),
    Mutant(
        PROMOTION,
        "holds & (known <= cost).all(axis=1) & ~probe",
        "holds & (known <= cost).all(axis=1)",
        ("test_rungs::TestASearch",),
        "probes are stopped",
    ),
    Mutant(
        RIVALS,
        "fits = (known <= cost).all(axis=1) & (ids",
        "fits = (known <= cost).any(axis=1) & (ids",
        ("test_racing::TestWhoIsTheRival",),
        "a rival need be cheaper in one cost only",
    ),
    # Early stopping.
    Mutant(
        STOPPING,
        "window = max(_WINDOW,",
        "window = min(_WINDOW,",
        ("test_score_limits::TestConvergence",),
        "the window shrinks instead of growing",
    ),
    Mutant(
        STOPPING,
        "saved = 1 - costs[1] / costs[0]",
        "saved = 1 - costs[0] / costs[1]",
        ("test_score_limits::TestConvergence",),
        "swapped operands",
    ),
    Mutant(
        STOPPING,
        "np.maximum(costs_of(trials, problem.cost_names), problem.budget_range[:, 0])",
        "np.minimum(costs_of(trials, problem.cost_names), problem.budget_range[:, 1])",
        ("test_score_limits::TestConvergence",),
        "costs below the range count",
    ),
    Mutant(
        STOPPING,
        "if trial.status in (OK, RACED) and trial.feasible]",
        "if trial.status in (OK, RACED)]",
        ("test_score_limits::TestConvergence",),
        "trials over the limit count",
    ),
    # Statistics of samples.
    Mutant(
        STATISTICS,
        "spread and spread * (1 - len(seen) / len(whole)) ** 0.5",
        "spread",
        ("test_statistics", "test_racing::TestASearch"),
        "no correction for a finite population",
    ),
    Mutant(
        STATISTICS,
        "return float(values.std(ddof=1) / np.sqrt(len(values)))",
        "return float(values.std() / np.sqrt(len(values)))",
        ("test_statistics",),
        "the biased standard deviation",
    ),
    Mutant(
        STATISTICS,
        "float(whole.mean() + per_weight)",
        "float(whole[: len(seen)].mean() + per_weight)",
        ("test_statistics", "test_racing::TestASearch"),
        "the mean of the samples seen only",
    ),
    Mutant(
        STATISTICS,
        "(values - ratio * weights).std(ddof=1)",
        "(values - ratio).std(ddof=1)",
        ("test_statistics", "test_losses"),
        "weights left out of the residuals",
    ),
    # Repair: no further than needed, within the limits.
    Mutant(
        REPAIR,
        "np.lexsort((ratios.sum(axis=1), ratios.max(axis=1)))",
        "np.lexsort((ratios.max(axis=1), ratios.sum(axis=1)))",
        ("test_repair",),
        "swapped keys",
    ),
    Mutant(
        REPAIR,
        "if (costs[best] > limits).any():",
        "if (costs[best] >= limits).any():",
        ("test_repair",),
        "a candidate at the limit is refused",
    ),
    Mutant(
        REPAIR,
        "alive &= (change <= room[:, None]).all(axis=2)",
        "alive &= (change < room[:, None]).all(axis=2)",
        ("test_changes",),
        "a step that just fits is not taken",
    ),
    Mutant(
        REPAIR,
        "np.repeat(np.cumsum(count) - count, count)",
        "np.repeat(np.cumsum(count) - 1, count)",
        ("test_repair",),
        "values counted from the wrong end",
    ),
    Mutant(
        PROBLEM,
        "np.rint(positions * (problem.sizes - 1) * problem.ordered)",
        "np.rint(positions * (problem.sizes - 1))",
        ("test_repair",),
        "choices without an order are pruned like the others",
    ),
    Mutant(
        PROBLEM,
        "(candidates != 0).sum(axis=1) <= 1",
        "(candidates != 0).sum(axis=1) == 1",
        ("test_repair",),
        "dense is no probe",
    ),
    Mutant(
        PARETO,
        "points[:, 1] < least_before",
        "points[:, 1] <= least_before",
        ("test_pareto",),
        "a point no better in one objective stays on the front",
    ),
    # Recipes and files.
    Mutant(
        MODEL_FILE,
        "own[dim] = np.asarray(own[dim])[index].tolist() if dim in own else index",
        "own[dim] = index",
        ("test_recipe",),
        "the second pruning replaces the first",
    ),
    Mutant(
        MODEL_FILE,
        '{**second["dense_shapes"], **first["dense_shapes"]}',
        '{**first["dense_shapes"], **second["dense_shapes"]}',
        ("test_recipe",),
        "swapped operands",
    ),
    Mutant(
        MODEL_FILE,
        "0 <= min(index) <= max(index) < size",
        "0 <= min(index) <= max(index) <= size",
        ("test_recipe::TestRefusals",),
        "an index one past the end",
    ),
    Mutant(
        TENSOR_FILE,
        "if metadata[HASH] != digest:",
        "if not metadata[HASH]:",
        ("test_recipe::TestRefusals",),
        "a hash that is not compared",
    ),
    Mutant(
        RESULT_FOLDER,
        "named = _named_in(found) if found.exists() else set()",
        "named: set[str] = set()",
        ("test_result::TestSaveAndLoad",),
        "files of an earlier save are overwritten",
    ),
    # Search spaces.
    Mutant(
        CHANNELS,
        "tuple(sorted(self.order[dimension.name][: dimension.options[options[j]]]))",
        "tuple(self.order[dimension.name][: dimension.options[options[j]]])",
        ("test_channels::TestWhatCandidatesMean",),
        "units in the order of importance",
    ),
    Mutant(
        SPARSITY,
        "math.floor(Fraction(str(level)) * elements)",
        "math.floor(level * elements)",
        ("test_sparsity::TestDimensions",),
        "rounding of a binary fraction",
    ),
    # Rules: what is joined.
    Mutant(
        f"{RULES}.shuffles",
        "out[axis] = flow.tie(op, labels.reshape(2, -1).T)",
        "out[axis] = flow.tie(op, labels.reshape(-1, 2))",
        ("test_structure",),
        "neighbours tied instead of halves",
    ),
    Mutant(
        f"{RULES}.layers",
        '("weight", "bias", "running_mean", "running_var")',
        '("weight", "bias", "running_mean")',
        ("test_structure",),
        "the running variance is not joined",
    ),
    Mutant(
        f"{RULES}.layers",
        "OUTER if len(grid) >= grid.shape[1] else INNER",
        "OUTER if len(grid) < grid.shape[1] else INNER",
        ("test_structure", "test_structure_odd"),
        "the worse choice by default",
    ),
    Mutant(
        f"{RULES}.attention",
        "np.repeat(shared, len(heads) // len(shared))",
        "np.tile(shared, len(heads) // len(shared))",
        ("test_heads",),
        "heads that share keys are interleaved",
    ),
    Mutant(
        f"{RULES}.layers",
        'kernel == at("stride") == 1 and at("padding") == 0',
        'kernel == at("stride") == 1',
        ("test_rules", "test_structure_odd"),
        "padded positions are taken for read ones",
    ),
)
