"""The command line: ``autoprune search``, ``front``, ``build``, ``inspect`` and ``profile``."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoprune.arguments import shown, whole_number
from autoprune.errors import AutopruneError, DataError, FileFormatError
from autoprune.files.access import as_path, shortened

if TYPE_CHECKING:
    import torch
    from torch import nn

    from autoprune.execution import Executor
    from autoprune.result import SearchResult
    from autoprune.result.trials import Trial
    from autoprune.search_spaces import Settings

_WATCH_SECONDS = 1.0
_MOST_THREADS = 4096
_LOOKS_ALONE = 5  # at a journal that no search holds, until its search counts as killed

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: no boxes, and nothing lost in a narrow terminal
    pretty_exceptions_enable=False,  # prints the values of locals, whole tensors among them
    help="Search how much of each layer of a PyTorch model to remove.",
)

MODEL_HELP = "The dense model, as FILE.py:NAME or package.module:NAME; a function or class is called without arguments."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The --run-dir of a search.")]
InputShape = Annotated[
    str | None, typer.Option(metavar="N,C,H,W", help="Shape of an example input, batch included; it holds noise.")
]
Example = Annotated[
    str | None,
    typer.Option(metavar="FILE.py:NAME", help="Example input: a tensor, a tuple, or a dict of keyword inputs."),
]
Rewrite = Annotated[
    str,
    typer.Option(
        metavar="auto|off",
        help="Modules whose code ties sizes: auto delivers them as graphs of what they ran, off leaves them.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


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
    debug: Debug = False,
) -> None:
    """Search a model under a budget, print the front, and save it in RUN_DIR.

    Ctrl-C stops the search, saves what was found so far, and exits with code 130.
    """
    with _errors_on_one_line(debug):
        from autoprune.cli.user_objects import load_model, load_object
        from autoprune.search import search as search_model

        saved = as_path(run_dir, "run-dir") / "result.json"
        if saved.exists() and not (
            resume or resume_anyway
        ):  # the search itself reports on the journal; this must not show at its end
            raise FileExistsError(
                f"run-dir must be a folder of its own, but {run_dir} holds a result; name another, or add --resume"
            )
        rounded = int(round_to) if round_to is not None and round_to.lstrip("-").isdecimal() else round_to
        dense = load_model(model, weights)
        named: dict[str, Any] = {"metric": metric, "evaluator": evaluator, "optimizer": optimizer, "rewrite": rewrite}
        named["trials"] = int(trials) if trials.lstrip("-").isdecimal() else trials
        named["executor"] = _executor(executor, workers, gpus_per_worker)
        result = search_model(
            dense,
            budget,
            None if data is None else load_object(data, "--data"),
            **named,  # checked by the search, which lists what there is
            space=_space(space, {"criterion": criterion, "round_to": rounded, "ignore": ignore}),
            racing=racing,
            max_seconds=max_seconds,
            seed=seed,
            example_inputs=_example_inputs(dense, input_shape, example, needed=data is None),
            run_dir=str(run_dir),
            resume="anyway" if resume_anyway else resume,
            latency=latency,
            cost_batch=cost_batch,
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


@app.command()
def front(
    run_dir: RunDir,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the front into this file.")] = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it as trials come, until the search ends.")] = False,
    debug: Debug = False,
) -> None:
    """Print the front of a search: finished, still running, or killed."""
    with _errors_on_one_line(debug):
        result = _watch(run_dir) if watch else _read(run_dir)
        if plot is not None:
            _plot(result, plot)
        typer.echo(json.dumps(_front_json(result), indent=1) if as_json else result)


@app.command()
def build(
    run_dir: RunDir,
    model: Annotated[str, typer.Option(metavar="FILE.py:NAME", help=MODEL_HELP)],
    output: Annotated[Path, typer.Option(help="The safetensors file to write; an existing one is replaced.")],
    budget: Annotated[
        list[str] | None, typer.Option(help="Take the best within this budget instead of the best; may be repeated.")
    ] = None,
    trial: Annotated[int | None, typer.Option(help="Take this trial of the front.")] = None,
    debug: Debug = False,
) -> None:
    """Write a pruned model of a finished search to one file."""
    with _errors_on_one_line(debug):
        from autoprune.cli.user_objects import load_model
        from autoprune.result import SearchResult
        from autoprune.result.recipe import save

        if trial is not None and budget:
            raise ValueError("give --trial or --budget, not both: a trial has the costs it has")
        if as_path(output, "output").is_dir():
            raise IsADirectoryError(f"output must be a file to write, got the folder {output}")
        if not output.absolute().parent.is_dir():
            raise FileNotFoundError(f"output must lie in a folder that exists, got {output}")
        as_path(run_dir, "RUN_DIR")
        if not (run_dir / "result.json").exists() and (run_dir / "journal.sqlite").exists():
            raise ValueError(
                f"{run_dir} holds a journal but no saved result, so no weights to build from; "
                "let its search end or stop it with Ctrl-C, which saves; if it was killed, go on with --resume"
            )
        result = SearchResult.load(run_dir, load_model(model, option="--model"))
        chosen = _choose(result, run_dir, budget, trial)
        save(result.build(chosen), output)
        typer.echo(_describe(result, chosen))
        typer.echo(f"saved as {output}; in Python: autoprune.load({str(output)!r}, fresh_model)")


@app.command()
def inspect(
    model: Model,
    rewrite: Rewrite = "auto",
    input_shape: InputShape = None,
    example: Example = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Report the prunable groups of a model with their costs, and the reasons why the rest stays."""
    with _errors_on_one_line(debug):
        from autoprune.cli.user_objects import load_model
        from autoprune.inspection import inspect as inspect_model

        dense = load_model(model)
        options: dict[str, Any] = {"rewrite": rewrite}  # checked by the inspection
        found = inspect_model(dense, _example_inputs(dense, input_shape, example), **options)
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
    debug: Debug = False,
) -> None:
    """Measure how long a model and its pruned versions take on this machine, for searches here or elsewhere."""
    with _errors_on_one_line(debug):
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
        found = measure(dense, _example_inputs(dense, input_shape, example), batch=batch, path=output, runtime=runtime)
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


@contextmanager
def _errors_on_one_line(debug: bool) -> Iterator[None]:
    """Turn mistakes of the user into one line and exit code 2; bugs, ours or the user's, keep their traceback."""
    try:
        yield
    except (AutopruneError, ValueError, OSError, ImportError) as error:
        if debug or not (isinstance(error, AutopruneError) or _raised_by_autoprune(error)):
            raise
        where = " (--debug shows where)" if isinstance(error, DataError) and error.__cause__ is not None else ""
        typer.echo(f"error: {' '.join(str(error).split())}{where}", err=True)
        raise typer.Exit(2) from None


def _raised_by_autoprune(error: BaseException) -> bool:
    """Return whether autoprune raised an error, directly or in the standard library, and not the user's code."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    tops = [name.partition(".")[0] for name in modules]
    return [top for top in tops if top not in sys.stdlib_module_names][-1] == "autoprune"


def _example_inputs(model: nn.Module, shape: str | None, example: str | None, needed: bool = True) -> Any:
    """Example inputs: those named, noise of a shape, or None for those of the model, which must exist if `needed`."""
    import torch

    from autoprune.cli.user_objects import load_object
    from autoprune.structure.example import require_fits
    from autoprune.structure.given import example_inputs_of

    if shape is not None and example is not None:
        raise ValueError("give --input-shape or --example, not both")
    if example is not None:
        return load_object(example, "--example")
    if shape is None and not needed:
        return None
    if shape is None:
        try:
            example_inputs_of(model)
        except ValueError as error:
            raise ValueError(
                f"{type(model).__name__} carries no example input of its own; give --input-shape, such as 2,3,224,224, "
                "or --example FILE.py:NAME"
            ) from error
        return None
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"input-shape must be positive numbers joined by commas, such as 2,3,224,224, got {shown(shape)}"
        )
    require_fits("input-shape must be of inputs", shape, 4 * math.prod(sizes))
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def _read(run_dir: Path) -> SearchResult:
    """Read the saved result, or the trials in the journal so far."""
    from autoprune.result import SearchResult
    from autoprune.result.from_journal import result_from_journal

    if not (as_path(run_dir, "RUN_DIR") / "result.json").exists():
        return result_from_journal(run_dir)
    try:
        return SearchResult.load(run_dir)
    except FileFormatError as error:
        if not (run_dir / "journal.sqlite").exists():
            raise
        typer.echo(f"warning: {error}", err=True)
    return result_from_journal(run_dir)


def _watch(run_dir: Path) -> SearchResult:
    """Show the trials in the journal until the search has all of them, saves its result or was killed, or Ctrl-C."""
    from rich.live import Live
    from rich.text import Text

    from autoprune.journal.sqlite_file import FILE_NAME, is_written
    from autoprune.result.from_journal import result_from_journal

    saved = run_dir / "result.json"
    before = saved.stat().st_mtime_ns if saved.exists() else 0  # of the search before it was resumed
    result = result_from_journal(run_dir)
    with Live(Text(str(result)), auto_refresh=False, transient=True) as live, suppress(KeyboardInterrupt):
        alone = 0
        while result.stopped == "unfinished" and not (saved.exists() and saved.stat().st_mtime_ns > before):
            began = time.monotonic()
            alone = 0 if is_written(run_dir / FILE_NAME) else alone + 1
            result = result_from_journal(run_dir)
            if alone >= _LOOKS_ALONE:
                break
            live.update(Text(str(result)), refresh=True)
            time.sleep(max(_WATCH_SECONDS, time.monotonic() - began))  # a long journal takes long to read
    return result


def _executor(name: str, workers: int | None, gpus_per_worker: float) -> str | Executor:
    """Executor by name, or Ray with the options for its workers."""
    if workers is None and not gpus_per_worker:
        return name
    if name != "ray":
        raise ValueError(f"--workers and --gpus-per-worker are for --executor ray, got --executor {name}")
    from autoprune.execution import RayExecutor

    return RayExecutor(workers=workers, gpus_per_worker=gpus_per_worker)


def _front_json(result: SearchResult) -> dict[str, Any]:
    """The result without the trials off the front, which it counts instead."""
    whole = result.to_json()
    dropped = ("format", "version", "space", "trials", "front")
    status = [trial.status for trial in result.trials]
    return {
        **{name: value for name, value in whole.items() if name not in dropped},
        "trials": {name: status.count(name) for name in ("ok", "raced", "failed", "pending")},
        "probes": sum(not trial.feasible for trial in result.trials),
        "front": [trial.to_json() for trial in result.front],
    }


def _plot(result: SearchResult, path: Path) -> None:
    try:
        result.plot(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"plot cannot be written to {shortened(path)}: {error!s:.200}") from error
    typer.echo(f"picture in {path}", err=True)


def _choose(result: SearchResult, run_dir: Path, budget: list[str] | None, number: int | None) -> Trial:
    """The trial to build, among those that were saved with weights."""
    from autoprune.result.builders import SavedWeights

    builder = result._builder
    there = builder.there() if isinstance(builder, SavedWeights) else set()
    saved = tuple(trial for trial in result.trials if trial.id in there)
    if not saved:
        raise ValueError(f"{run_dir} was saved without weights; search again, or save the result with weights='front'")
    if number is None:
        return replace(result, trials=saved).best(budget or None)
    for trial in saved:
        if trial.id == number:
            return trial
    raise ValueError(f"trial must be one saved with weights, {[trial.id for trial in saved]}, got {number}")


def _describe(result: SearchResult, trial: Trial) -> str:
    from autoprune.result.tables import engineering

    costs = ", ".join(
        f"{name} {engineering(value)} ({value / result.dense.costs[name]:.1%} of dense)"
        for name, value in trial.costs.items()
    )
    scores = f"{result.metric} {trial.score:.4f} (dense {result.dense.score:.4f})"
    if trial.test_score is not None and result.dense.test_score is not None:
        scores += f", held out {trial.test_score:.4f} (dense {result.dense.test_score:.4f})"
    return f"trial {trial.id}: {costs}; {scores}"
