"""``autoprune search``: a search with its settings as options."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoprune.cli.mistakes import errors_on_one_line
from autoprune.cli.options import Debug, Example, Imports, InputShape, Model, Rewrite
from autoprune.cli.user_objects import example_inputs, import_first
from autoprune.files.access import as_path

if TYPE_CHECKING:
    from autoprune.execution import Executor
    from autoprune.search_spaces import Settings


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
    optimizer: Annotated[str, typer.Option(help="auto, knapsack, milp, level_switch, nsga2, bayes, random.")] = "auto",
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
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto", help="Processes here; auto if they are faster. With ray: by default as many as fit."
        ),
    ] = None,
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
        count: Any = int(workers) if workers is not None and workers.lstrip("-").isdecimal() else workers
        runner: Any = _executor(executor, count, gpus_per_worker)
        result = search_model(
            dense,
            budget,
            None if data is None else load_object(data, "--data"),
            **named,  # checked by the search, which lists what there is
            space=space_of(space, {"criterion": criterion, "round_to": rounded, "ignore": ignore}),
            early_stopping=True if racing else "auto",
            max_seconds=max_seconds,
            seed=seed,
            example=Call(inputs=example_inputs(dense, input_shape, example, needed=data is None), **call),
            costs=None if latency is None else {"latency_ms": latency},
            execution=Execution(
                executor=runner,
                workers=count if executor == "local" else None,
                run_dir=run_dir,
                resume="anyway" if resume_anyway else resume,
            ),
        )
        result.save(run_dir, replace=resume)  # of the search before it was resumed
        typer.echo(result)
        typer.echo(f"\nsaved in {run_dir}: result.json, and the weights of each model on the front")
        if result.front:
            command = ["autoprune", "build", str(run_dir), "--model", model, "--output", "small.safetensors"]
            typer.echo(f"next: {shlex.join(command)}")
    if result.stopped == "interrupted":
        raise typer.Exit(130)


def space_of(spec: str, options: Mapping[str, Any]) -> Settings:
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


def _executor(name: str, workers: int | None, gpus_per_worker: float) -> str | Executor:
    """Executor by name, or Ray with the options for its workers."""
    if (workers is None or name == "local") and not gpus_per_worker:
        return name
    if name != "ray":
        raise ValueError(f"--gpus-per-worker is for --executor ray, got --executor {name}")
    from autoprune.execution import RayExecutor

    return RayExecutor(workers=workers, gpus_per_worker=gpus_per_worker)
