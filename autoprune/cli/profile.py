"""``autoprune profile``: latencies of a model on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.arguments import shown, whole_number
from autoprune.cli.mistakes import errors_on_one_line
from autoprune.cli.options import Debug, Example, Imports, InputShape, Model
from autoprune.cli.user_objects import example_inputs, import_first
from autoprune.files.access import as_path

if TYPE_CHECKING:
    import torch

_MOST_THREADS = 4096


def profile(
    model: Model,
    output: Annotated[Path, typer.Option(metavar="FILE.json", help="The table to write; interrupted, it goes on.")],
    batch: Annotated[int, typer.Option(help="Samples of one forward pass.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; as many as PyTorch chooses if not given.")
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="torch, onnxruntime (exported to ONNX; on the CPU) or onnxruntime:PROVIDER.")
    ] = "torch",
    input_shape: InputShape = None,
    example: Example = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Measure how long a model and its pruned versions take on this machine, for searches here or elsewhere."""
    with errors_on_one_line(debug):
        import_first(imports)
        import torch

        from autoprune.cli.user_objects import load_model
        from autoprune.costs.latency.profile import profile as measure

        on = _device(device)
        gpus = torch.cuda.device_count()
        if on.type == "cuda" and (on.index or 0) >= gpus:
            raise ValueError(f"device must be one of this machine, got {device!r}, and PyTorch sees {gpus} GPUs here")
        if threads is not None:
            torch.set_num_threads(whole_number("threads", threads, 1, _MOST_THREADS))
        if as_path(output, "output").is_dir():
            raise IsADirectoryError(f"output must be a file to write the table to, got the folder {output}")
        dense = load_model(model).to(on)
        found = measure(dense, example_inputs(dense, input_shape, example), batch=batch, path=output, runtime=runtime)
        for line in (found, *found.notes):
            typer.echo(line)
        typer.echo(
            f'saved as {output}; next: autoprune search {model} --budget "latency <= 60%" --latency {output} ...'
        )


def _device(name: str) -> torch.device:
    import torch

    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {shown(name)}")
    return found
