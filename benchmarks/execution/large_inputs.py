"""Large inputs: a front of 10,000 points, a network of 300 MB, 1,000 layers, and 250 dimensions.

``python -m benchmarks.execution.large_inputs`` (about 15 minutes on one thread; Linux) measures each part in a process
of its own, after a small search that has imported what there is to import. ``--before PATH`` measures another checkout,
too, such as a worktree of an earlier commit, in the same run; a part that takes over ``--limit`` seconds of processor
time, which other work on the machine does not change, is ended there, and Ctrl-C ends what is left. ``--only front
dimensions`` takes some parts. Exits with 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

COMMAND = "python -m benchmarks.execution.large_inputs"
ROOT = Path(__file__).parents[2]
POINTS, DEPTH, WIDE_DIMENSIONS = 10_000, 1_000, 250
MOST = {
    "front, s": 1.0,
    "to_frame, s": 2.0,
    "plot, s": 2.0,
    "linear: peak over its size": 2.5,
    "linear: kept over its size": 0.3,
    "convolutions: peak over its size": 2.5,
    "convolutions: kept over its size": 0.3,
    "plain: inspect, s": 20.0,
    "plain: 10 trials, s": 60.0,
    "residual: inspect, s": 20.0,
    "residual: 10 trials, s": 60.0,
    "convolutional: inspect, s": 20.0,
    "convolutional: 10 trials, s": 60.0,
    "failed of 30 trials": 0,
}


class Block(nn.Module):
    """Two linear layers behind a norm, next to the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.enter, self.leave = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        nn.init.normal_(self.leave.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(torch.relu(self.enter(self.norm(x))))


class ConvBlock(nn.Module):
    """Two convolutions with batch norm, next to the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.first = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.leave, self.second = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        nn.init.constant_(self.second.weight, 0.05)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.leave(torch.relu(self.first(self.enter(x))))))


def plain(layers: int, width: int = 16, inputs: int = 8) -> nn.Module:
    """A chain of linear layers that keeps the scale of what goes through it."""
    sizes = [inputs, *[width] * (layers - 1)]
    modules: list[nn.Module] = []
    for entering in sizes[:-1]:
        modules += [nn.Linear(entering, width), nn.ReLU()]
        nn.init.kaiming_normal_(modules[-2].weight)  # type: ignore[arg-type]  # of a linear layer
    return nn.Sequential(*modules, nn.Linear(width, 4)).eval()


def residual(layers: int, width: int = 16) -> nn.Module:
    """Network of `layers` linear layers, all but two of them in residual blocks."""
    return nn.Sequential(nn.Linear(8, width), *(Block(width) for _ in range(layers // 2 - 1)), nn.Linear(width, 4))


def convolutional(layers: int, width: int = 8) -> nn.Module:
    """Network of `layers` layers, all but two of them convolutions in residual blocks."""
    blocks = [ConvBlock(width) for _ in range(layers // 2 - 1)]
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *blocks, *ends)


def wide_linear() -> nn.Module:
    return plain(11, width=2_900, inputs=64)


def wide_convolutions() -> nn.Module:
    """Eight convolutions of 1,020 channels."""
    modules: list[nn.Module] = []
    for entering in (3, *[1_020] * 8):
        modules += [nn.Conv2d(entering, 1_020, 3, padding=1), nn.BatchNorm2d(1_020), nn.ReLU()]
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1_020, 4))


def data(samples: int, *shape: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(samples, *shape, generator=draw), torch.randint(0, 4, (samples,), generator=draw)


def searched(model: nn.Module, given: tuple[Tensor, Tensor], trials: int) -> Any:
    import autoprune

    return autoprune.search(
        model.eval(), "flops <= 50%", given, trials=trials, execution=autoprune.Execution(progress=False)
    )


def resident_mb(which: str) -> float:
    """Memory of this process: ``VmRSS`` is what it holds, ``VmHWM`` the most that it held."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of a call, and what it returns."""
    began = time.process_time()
    returned = function()
    return time.process_time() - began, returned


def front() -> dict[str, float]:
    """A result whose front has 10,000 points: found, as a table, and drawn."""
    import dataclasses

    from autoprune.result.trials import find_front

    result = searched(plain(4), data(64, 8), 4)
    model = result.trials[0]
    many = [
        dataclasses.replace(
            model, id=i, status="ok", feasible=True, score=i / POINTS, signal=-i / POINTS, costs={"flops": 1e6 + i}
        )
        for i in range(POINTS)
    ]
    direction = getattr(result, "direction", True)  # an earlier checkout has none
    took, found = seconds(lambda: find_front(many, ("flops",), direction))
    assert len(found) == POINTS
    large = dataclasses.replace(result, trials=tuple(many), front=tuple(found))
    figures = {"front, s": took, "to_frame, s": seconds(large.to_frame)[0]}
    with tempfile.TemporaryDirectory() as folder:
        figures["plot, s"] = seconds(lambda: large.plot(f"{folder}/front.png"))[0]
    return figures


def memory(name: str, make: Callable[[], nn.Module], given: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Memory of a search over what model and data take, in sizes of the model: the peak, and what stays with a result.

    From resident memory, so whatever the C library keeps for itself counts.
    """
    model = make()
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    gc.collect()
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    took, result = seconds(lambda: searched(model, given, 10))
    peak = resident_mb("VmHWM")
    gc.collect()
    left = resident_mb("VmRSS")
    assert result.front
    return {
        f"{name}: size, MB": size,
        f"{name}: peak over its size": (peak - before) / size,
        f"{name}: kept over its size": (left - before) / size,
        f"{name}: search, s": took,
    }


def deep(name: str, make: Callable[[int], nn.Module], given: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Processor seconds of a network of 1,000 layers."""
    import autoprune

    inspected, found = seconds(lambda: autoprune.inspect(make(DEPTH).eval(), given[0][:2]))
    print(json.dumps({f"{name}: inspect, s": inspected}), flush=True)  # kept where the search is ended
    took, result = seconds(lambda: searched(make(DEPTH), given, 10))
    return {
        f"{name}: inspect, s": inspected,
        f"{name}: groups": len(found.groups),
        f"{name}: 10 trials, s": took,
        f"{name}: failed": sum(trial.status == "failed" for trial in result.trials),
    }


def dimensions() -> dict[str, float]:
    """30 trials with `auto` in 250 dimensions."""
    took, result = seconds(lambda: searched(plain(WIDE_DIMENSIONS + 1), data(256, 8), 30))
    assert len(result.space.sizes) == WIDE_DIMENSIONS
    failed = [trial for trial in result.trials if trial.status == "failed"]
    for reason in sorted({trial.reason for trial in failed}):
        print(reason, file=sys.stderr)
    return {"30 trials, s": took, "failed of 30 trials": len(failed)}


PARTS: dict[str, Callable[[], dict[str, float]]] = {
    "front": front,
    "dimensions": dimensions,
    "memory-linear": lambda: memory("linear", wide_linear, data(64, 64)),
    "memory-convolutions": lambda: memory("convolutions", wide_convolutions, data(32, 3, 4, 4)),
    "layers-plain": lambda: deep("plain", plain, data(128, 8)),
    "layers-residual": lambda: deep("residual", residual, data(128, 8)),
    "layers-convolutional": lambda: deep("convolutional", convolutional, data(64, 3, 8, 8)),
}


def measure(part: str) -> None:
    """Print the figures of one part as JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    searched(plain(4), data(64, 8), 6)
    print(json.dumps(PARTS[part]()))


def in_process(part: str, code: Path, limit: float) -> dict[str, float]:
    """The figures of one part with the autoprune of a checkout, in a process of its own; what it has at the limit."""
    call = [sys.executable, "-P", str(Path(__file__).resolve()), "--measure", part]
    environment = {**os.environ, "PYTHONPATH": str(code.resolve()), "OMP_NUM_THREADS": "1"}
    most = int(limit)
    printed = subprocess.run(
        call,
        cwd=code,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (most, most)),
    ).stdout
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--before", type=Path, help="another checkout that is measured, too")
    parser.add_argument("--limit", type=float, default=600.0, help="processor seconds for one part")
    parser.add_argument("--measure", choices=PARTS, help="one part in this process, printed as JSON")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return 0
    from benchmarks.support.common import environment, table, write

    where = environment(COMMAND)
    codes = {"now": ROOT, **({"before": options.before} if options.before else {})}
    found: dict[str, dict[str, float]] = {name: {} for name in codes}
    with suppress(KeyboardInterrupt):
        for name, code in codes.items():
            for part in options.only:
                found[name] |= in_process(part, code, options.limit)
                print(part, name, found[name], flush=True)
    wanted = {name: most for name, most in MOST.items() if options.only == list(PARTS) or name in found["now"]}
    missed = [name for name, most in wanted.items() if not found["now"].get(name, float("inf")) <= most]
    rows = [
        (
            name,
            *(f"{found[code][name]:.2f}" if name in found[code] else "not reached" for code in codes),
            MOST.get(name, ""),
        )
        for name in dict.fromkeys(name for code in codes for name in found[code])
    ]
    text = (
        f"{table(('figure', *codes, 'at most'), rows)}\n\nSeconds are processor time. *Not reached*: not within "
        f"{options.limit:.0f} s, or the run was ended before. Targets "
        f"{'met' if not missed else 'NOT met: ' + ', '.join(missed)}."
    )
    if options.only == list(PARTS):
        write("large_inputs", "Large inputs", {"environment": where, "missed": missed, **found}, text)
    else:
        print(text)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
