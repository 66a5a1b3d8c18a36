"""The command line: ``autoprune search``, ``front``, ``build``, ``inspect`` and ``profile``."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoprune.arguments import shown, whole_number
from autoprune.cli.build import build
from autoprune.cli.front import front
from autoprune.cli.mistakes import errors_on_one_line
from autoprune.cli.options import AsJson, Debug, Example, Imports, InputShape, Model, Rewrite
from autoprune.cli.user_objects import example_inputs, import_first
from autoprune.files.access import as_path

if TYPE_CHECKING:
    import torch

    from autoprune.execution import Executor
    from autoprune.search_spaces import Settings

_MOST_THREADS = 4096

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: no boxes, and nothing lost in a narrow terminal
    pretty_exceptions_enable=False,  # prints the values of locals, whole tensors among them
    help="Search how much of each layer of a PyTorch model to remove.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from autoprune import __version__

        typer.echo(f"autoprune {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("autoprune").setLevel(logging.INFO)


@app.command()
def search(
    model: Model,
    budget: Annotated[
        list[str],
        typer.Option(
            help='Limit, such as "flops <= 50%", "params <= 1.2M" or "accuracy drop <= 1pp"; may be repeated.'
        ),
    ],
    run_dir: Annotated[Path, typer.Option(help="New folder for the journal and the result, unless resumed.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="autoprune.Data, a DataLoader or (X, y) arrays. Without it, agreement with the dense model on noise.",
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="State dict to load into the model: .safetensors, or from torch.save.")
    ] = None,
    trials: Annotated[
        str,
        typer.Option(metavar="N|auto", help="Candidates to evaluate; auto stops when they no longer gain anything."),
    ] = "200",
    max_seconds: Annotated[float | None, typer.Option(help="Stop after this time.")] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal fronts.")] = 0,
    metric: Annotated[
        str, typer.Option(help="auto, accuracy, agreement, cosine, loss, miou, mse, next_token or relative_error.")
    ] = "auto",
    optimizer: Annotated[str, typer.Option(help="auto, knapsack, level_switch, nsga2, bayes or random.")] = "auto",
    evaluator: Annotated[str, typer.Option(help="auto, adaptive_bn, compensated, finetune or supernet.")] = "auto",
    racing: Annotated[bool, typer.Option(help="Drop candidates once they are known to be dominated.")] = False,
    space: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE.py:NAME",
            help="channels (widths), sparsity (elements set to zero), or settings such as autoprune.Channels(...).",
        ),
    ] = "channels",
    criterion: Annotated[str | None, typer.Option(help="What ranks channels, such as l1, l2 or taylor.")] = None,
    round_to: Annotated[
        str | None, typer.Option(metavar="N|auto", help="Widths are multiples of this; auto: steps of latency.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help='Module to leave whole, by name or glob, such as "head*"; may be repeated.')
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the search in --run-dir, or begin it; --trials may be more.")
    ] = False,
    resume_anyway: Annotated[
        bool, typer.Option("--resume-anyway", help="The same although the search differs; a note says in what.")
    ] = False,
    executor: Annotated[str, typer.Option(help="local or ray.")] = "local",
    workers: Annotated[int | None, typer.Option(help="With ray: how many; by default as many as fit.")] = None,
    gpus_per_worker: Annotated[float, typer.Option(help="With ray: GPUs of each, such as 0.5.")] = 0.0,
    latency: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Latencies measured by autoprune profile.")
    ] = None,
    cost_batch: Annotated[int, typer.Option(help="Samples that latency and memory are of.")] = 1,
    rewrite: Rewrite = "auto",
    input_shape: InputShape = None,
    example: Example = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Search a model under a budget, print the front, and save it in RUN_DIR.

    Ctrl-C stops the search, saves what was found so far, and exits with code 130.
    """
    with errors_on_one_line(debug):
        import_first(imports)
        from autoprune.cli.user_objects import load_model, load_object
        from autoprune.execution import Execution
        from autoprune.search import search as search_model
        from autoprune.structure.call import Call

        saved = as_path(run_dir, "run-dir") / "result.json"
        if saved.exists() and not (
            resume or resume_anyway
        ):  # the search itself reports on the journal; this must not show at its end
            raise FileExistsError(
                f"run-dir must be a folder of its own, but {run_dir} holds a result; name another, or add --resume"
            )
        rounded = int(round_to) if round_to is not None and round_to.lstrip("-").isdecimal() else round_to
        dense = load_model(model, weights)
        named: dict[str, Any] = {"metric": metric, "evaluator": evaluator, "optimizer": optimizer}
        named["trials"] = int(trials) if trials.lstrip("-").isdecimal() else trials
        call: dict[str, Any] = {"rewrite": rewrite, "cost_batch": cost_batch}
        runner: Any = _executor(executor, workers, gpus_per_worker)
        result = search_model(
            dense,
            budget,
            None if data is None else load_object(data, "--data"),
            **named,  # checked by the search, which lists what there is
            space=_space(space, {"criterion": criterion, "round_to": rounded, "ignore": ignore}),
            early_stopping=racing,
            max_seconds=max_seconds,
            seed=seed,
            example=Call(inputs=example_inputs(dense, input_shape, example, needed=data is None), **call),
            costs=None if latency is None else {"latency_ms": latency},
            execution=Execution(executor=runner, run_dir=run_dir, resume="anyway" if resume_anyway else resume),
        )
        result.save(run_dir, replace=resume)  # of the search before it was resumed
        typer.echo(result)
        typer.echo(f"\nsaved in {run_dir}: result.json, and the weights of each model on the front")
        if result.front:
            command = ["autoprune", "build", str(run_dir), "--model", model, "--output", "small.safetensors"]
            typer.echo(f"next: {shlex.join(command)}")
    if result.stopped == "interrupted":
        raise typer.Exit(130)


def _space(spec: str, options: Mapping[str, Any]) -> Settings:
    """The space by its name with the options that were given, or settings from a file, which take none.

    Raises:
        ValueError: If an option is not one of the space's, or the settings come from a file.
    """
    from autoprune.cli.user_objects import load_object
    from autoprune.search_spaces import make_space, settings_by_name

    given = {name: value for name, value in options.items() if value is not None}
    named = settings_by_name()
    if spec not in named and ":" not in spec:
        raise ValueError(f"--space must be one of {sorted(named)}, or FILE.py:NAME, got {spec!r}")
    known = set(signature(named[spec]).parameters) if spec in named else set()
    for name in given:
        if name not in known:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} must be left out with --space {spec}, which has no such setting")
    return named[spec](**given) if spec in named else make_space(load_object(spec, "--space"))


app.command()(front)
app.command()(build)


@app.command()
def inspect(
    model: Model,
    rewrite: Rewrite = "auto",
    input_shape: InputShape = None,
    example: Example = None,
    as_json: AsJson = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Report the prunable groups of a model with their costs, and the reasons why the rest stays."""
    with errors_on_one_line(debug):
        import_first(imports)
        from autoprune.cli.user_objects import load_model
        from autoprune.inspection import inspect as inspect_model
        from autoprune.structure.call import Call

        dense = load_model(model)
        options: dict[str, Any] = {"rewrite": rewrite}  # checked by the call
        found = inspect_model(dense, Call(inputs=example_inputs(dense, input_shape, example), **options))
        typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else found)


@app.command()
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


def _executor(name: str, workers: int | None, gpus_per_worker: float) -> str | Executor:
    """Executor by name, or Ray with the options for its workers."""
    if workers is None and not gpus_per_worker:
        return name
    if name != "ray":
        raise ValueError(f"--workers and --gpus-per-worker are for --executor ray, got --executor {name}")
    from autoprune.execution import RayExecutor

    return RayExecutor(workers=workers, gpus_per_worker=gpus_per_worker)
