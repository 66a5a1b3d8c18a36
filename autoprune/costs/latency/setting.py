"""Setting that measured latencies hold for: model, inputs, machine and runtime."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from autoprune.costs.operations.runtimes import Runtime
from autoprune.structure.example import Example


@dataclass(frozen=True)
class Setting:
    """Conditions that latencies hold for.

    Attributes:
        model: Class of the model.
        inputs: Type and shape of each input tensor, such as ``"float32 1x3x32x32"``.
        batch: Samples of one forward pass.
        device: ``"cpu"`` or ``"cuda"``.
        machine: Name of the processor or GPU.
        threads: Threads of PyTorch.
        runtime: Name of the runtime, as `autoprune.profile` takes it, or a name of the user's.
        versions: Of Python, PyTorch, autoprune and the runtime.
        date: Date of the measurement, UTC.
    """

    model: str
    inputs: tuple[str, ...]
    batch: int
    device: str
    machine: str
    threads: int
    runtime: str
    versions: Mapping[str, str]
    date: str

    def elsewhere(self, here: Setting) -> list[str]:
        """Differences to `here` in the conditions that times depend on, as ``"threads 1, here 2"``."""
        names = ("device", "machine", "threads", "runtime")
        found = [
            f"{n} {getattr(self, n)}, here {getattr(here, n)}" for n in names if getattr(self, n) != getattr(here, n)
        ]
        if self.runtime == here.runtime and self.runtime_version != here.runtime_version:
            found.append(f"{self.library} {self.runtime_version or 'of no version'}, here {here.runtime_version}")
        return found

    @property
    def library(self) -> str:
        """Name of the runtime without its provider."""
        return self.runtime.partition(":")[0]

    @property
    def runtime_version(self) -> str:
        """Version of the runtime, empty if it is not known."""
        return self.versions.get(self.library, "")


def setting_of(example: Example, runtime: Runtime) -> Setting:
    """Return the conditions of latencies that are measured here and now."""
    from autoprune import __version__

    device = next(example.model.parameters()).device
    inputs = [leaf for leaf in tree_leaves((example.args, dict(example.kwargs))) if isinstance(leaf, Tensor)]
    return Setting(
        model=type(example.model).__name__,
        inputs=tuple(f"{str(x.dtype).removeprefix('torch.')} {'x'.join(map(str, x.shape))}" for x in inputs),
        batch=example.samples,
        device=device.type,
        machine=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        threads=torch.get_num_threads(),
        runtime=runtime.name,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "autoprune": __version__,
            **runtime.versions,
        },
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
