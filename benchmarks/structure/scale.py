"""Growth of structure discovery with the model: 7 billion parameters, 1,000 blocks, ResNet-50 with its checks.

Run ``python -m benchmarks.structure.scale`` from the root of the repository, about 2 minutes on one thread; exits with
1 when a target is missed. Times are processor times. The Llama-shaped model lives on the meta device, which holds no
values: structure can be found there, checks need real ones.
"""

from __future__ import annotations

import resource
import sys
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.structure.analysis import analyse, best_choices
from autoprune.structure.example import Example
from autoprune.structure.structure import assemble
from autoprune.structure.tracing.trace import trace
from benchmarks.support.common import environment, table, write
from zoo.resnet import Bottleneck

COMMAND = "python -m benchmarks.structure.scale"
MOST_LLAMA_SECONDS, MOST_LLAMA_GB = 10.0, 2.0
MOST_RESNET_SECONDS = 10.0
MOST_GROWTH = 2.3  # when the number of blocks doubles
BLOCKS = (250, 500, 1000)


def llama_7b(**sizes: int) -> nn.Module:
    """Llama's first 7 B shape on the meta device; `sizes` override the configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**shape, "vocab_size": 32000, **sizes}, use_cache=False)).eval()


def llama_inputs(tokens: int = 16) -> dict[str, Tensor]:
    """Tokens with the causal mask made already, because transformers reads values where it makes one."""
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    return {"input_ids": torch.zeros(1, tokens, dtype=torch.int64), "attention_mask": mask}


class Block(nn.Module):
    """A residual block of two linear layers behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.enter, self.leave = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(torch.relu(self.enter(self.norm(x))))


def chain(blocks: int, width: int = 16) -> nn.Module:
    """Chain of `blocks` residual blocks between two linear layers."""
    return nn.Sequential(nn.Linear(8, width), *(Block(width) for _ in range(blocks)), nn.Linear(width, 4)).eval()


def resnet50() -> nn.Module:
    """ResNet-50 in its ImageNet shape (He et al., 2016)."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    stages, inputs = [], 64
    for width, blocks, stride in ((256, 3, 1), (512, 4, 2), (1024, 6, 2), (2048, 3, 2)):
        stages += [Bottleneck(inputs if i == 0 else width, width, stride if i == 0 else 1) for i in range(blocks)]
        inputs = width
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)).eval()


def discover(model: nn.Module, kwargs: dict[str, Tensor], *args: Tensor) -> dict[str, float]:
    """Processor seconds of each step from a model to its structure, without checks."""
    clock = [time.process_time()]
    record = trace(Example(model, args, kwargs, forward))
    clock.append(time.process_time())
    flow, units = best_choices(record)
    clock.append(time.process_time())
    structure = assemble(flow, units)
    clock.append(time.process_time())
    steps = {name: b - a for name, a, b in zip(("trace", "propagate", "assemble"), clock, clock[1:], strict=False)}
    sizes = {"operations": len(record.ops), "labels": flow.count, "groups": len(structure.groups)}
    return {**steps, "seconds": clock[-1] - clock[0], **sizes, "on_meta": float(record.device == "meta")}


def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The logits of a language model, the output of others."""
    out = model(*args, **kwargs)
    return getattr(out, "logits", out)


def peak_gb() -> float:
    """Most memory that this process ever held, in GB; Linux reports KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run_llama() -> dict[str, float]:
    """Discovery on the Llama shape, with the memory that it added."""
    model = llama_7b()
    before = peak_gb()
    found = discover(model, llama_inputs())
    return {**found, "parameters": float(sum(p.numel() for p in model.parameters())), "gb": peak_gb() - before}


def run_resnet50() -> dict[str, float]:
    """Analysis of ResNet-50 at 224x224, one image, with all checks."""
    model, image = resnet50(), torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    start = time.process_time()
    structure = analyse(Example(model, (image,)))
    return {"seconds": time.process_time() - start, "groups": len(structure.groups)}


def main() -> int:
    """Measure, write the report, and say whether all targets are met."""
    torch.set_num_threads(1)
    where = environment(COMMAND)
    discover(chain(1), {}, torch.zeros(2, 8))  # the first trace imports
    llama = run_llama()
    chains = {n: discover(chain(n), {}, torch.zeros(2, 8)) for n in BLOCKS}
    growth = max(chains[b]["seconds"] / chains[a]["seconds"] for a, b in pairwise(BLOCKS))
    resnet = run_resnet50()
    targets = {
        f"Llama shape: below {MOST_LLAMA_SECONDS:.0f} s": llama["seconds"] < MOST_LLAMA_SECONDS,
        f"Llama shape: below {MOST_LLAMA_GB:.0f} GB": llama["gb"] < MOST_LLAMA_GB,
        f"twice the blocks: at most {MOST_GROWTH} times the time": growth <= MOST_GROWTH,
        f"ResNet-50 with checks: below {MOST_RESNET_SECONDS:.0f} s": resnet["seconds"] < MOST_RESNET_SECONDS,
    }
    results = {"environment": where, "targets": targets, "llama": llama, "chains": chains, "resnet50": resnet}
    write("scale", "Structure discovery at scale", results, report(llama, chains, growth, resnet, targets))
    return 0 if all(targets.values()) else 1


def report(
    llama: dict[str, float],
    chains: dict[int, dict[str, float]],
    growth: float,
    resnet: dict[str, float],
    targets: dict[str, bool],
) -> str:
    """The tables, in Markdown."""
    steps = ("trace", "propagate", "assemble", "seconds")
    rows = [(f"Llama, {llama['parameters'] / 1e9:.1f} B", llama), *((f"{n} blocks", row) for n, row in chains.items())]
    return "\n\n".join(
        (
            table(
                ("model", "operations", "labels", "groups", *(f"{step} (s)" for step in steps)),
                [
                    (
                        name,
                        *(f"{row[key]:.0f}" for key in ("operations", "labels", "groups")),
                        *(f"{row[s]:.2f}" for s in steps),
                    )
                    for name, row in rows
                ],
            ),
            f"Llama shape: {llama['gb']:.2f} GB more memory at the peak, traced on the meta device. "
            f"Twice the blocks take at most {growth:.2f} times the time. "
            f"ResNet-50 at 224x224 with checks: {resnet['seconds']:.1f} s, {resnet['groups']:.0f} groups.",
            table(("target", "met"), [(name, "yes" if met else "NO") for name, met in targets.items()]),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
