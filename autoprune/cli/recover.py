"""``autoprune recover``: training of a pruned model, with the dense one as its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autoprune.cli.chosen import Budgets, Source, TrialNumber, pruned_model
from autoprune.cli.mistakes import errors_on_one_line
from autoprune.cli.options import MODEL_HELP, Debug, Imports
from autoprune.cli.user_objects import import_first, load_model, load_object
from autoprune.cli.written import OWN, next_command, require_writable, write_model


def recover(
    source: Source,
    model: Annotated[str, typer.Option(metavar="FILE.py:NAME", help=MODEL_HELP + " It is the teacher.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE.py:NAME",
            help="autoprune.Data, whose calibration samples are trained on and whose validation samples choose the "
            "weights; or a DataLoader or (X, y) arrays.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The file to write; an existing one is replaced.")],
    weights: Annotated[
        Path | None, typer.Option(help="State dict to load into the teacher: .safetensors, or from torch.save.")
    ] = None,
    train: Annotated[str, typer.Option(metavar="all|norm+bias|lora", help="Parameters to train.")] = "all",
    distill: Annotated[
        str, typer.Option(metavar="auto|inner|logits|none", help="What to learn from the teacher.")
    ] = "auto",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    steps_to: Annotated[int, typer.Option(help="Nested networks from the dense one to the pruned one.")] = 1,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples of a step, for arrays and datasets.")] = 64,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Keep the state of the training in this file, and go on from it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal weights.")] = 0,
    budget: Budgets = None,
    trial: TrialNumber = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Train a pruned model of a finished search or a saved file, print the receipt, and save the model.

    Ctrl-C stops the training, and saves the last good weights.
    """
    with errors_on_one_line(debug):
        import_first(imports)
        from autoprune.evaluators.recovery.recover import recover as recover_model
        from autoprune.evaluators.recovery.recovery import Recovery

        require_writable(output)
        named: dict[str, Any] = {"train": train, "distill": distill}  # checked by the recipe
        recipe = Recovery(steps=steps, steps_to=steps_to, lr=lr, batch_size=batch_size, seed=seed, **named)
        dense = load_model(model, weights, option="--model")
        small, told = pruned_model(source, dense, budget, trial)
        typer.echo(told)
        samples = load_object(data, "--data")
        typer.echo(recover_model(small, samples, dense, checkpoint=checkpoint, recipe=recipe))
        typer.echo(write_model(small, output, OWN, None))
        typer.echo(next_command("export", str(output), model, output=f"{output.with_suffix('.onnx')}"))
