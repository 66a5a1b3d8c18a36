"""Export of a model to a file for other runtimes, whose outputs are compared with the model's before it is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from autoprune.arguments import one_of
from autoprune.errors import UnsupportedModelError
from autoprune.files.access import as_path, brief, replacing, shortened
from autoprune.result.exporting.call import Call
from autoprune.result.exporting.parity import Parity, checked_tolerance, compare
from autoprune.result.exporting.program import Program, traced
from autoprune.result.exporting.torch_program import write_program
from autoprune.structure.given import ExampleInputs, unwrap
from autoprune.structure.slicing.slicing import Edit, build

ENDINGS = {".onnx": "onnx", ".pt2": "torch"}
FORMATS = ("onnx", "torch", "hf")


@dataclass(frozen=True)
class Exported:
    """Exported file, after its outputs were compared with the model's.

    Attributes:
        path: The file, or the folder.
        format: ``"onnx"``, ``"torch"`` or ``"hf"``.
        parity: Differences of its outputs.
        dynamic: Names of the dimensions that may have any size, by input and dimension.
        notes: What is fixed or was left out, in plain words.
    """

    path: Path
    format: str
    parity: Parity
    dynamic: dict[str, dict[int, str]]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        if self.format == "hf":
            same = "a model loaded from it gives the same outputs to the last bit"
            return "\n".join([f"{self.path}: {same}", *(f"note: {note}" for note in self.notes)])
        free = sorted({word for dims in self.dynamic.values() for word in dims.values()})
        sizes = f"any {' and '.join(free)}" if free else "the sizes of the example"
        lines = [
            f"{self.path}: {self.format}, for {sizes}; its outputs differ from the model's by up to "
            f"{self.parity.absolute:.2g} ({self.parity.relative:.1g} of the largest value)"
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def export(
    small: nn.Module,
    path: str | Path,
    example: ExampleInputs | None = None,
    *,
    format: str | None = None,  # noqa: A002  # the word that users look for
    tolerance: float | None = None,
) -> Exported:
    """Export a model, pruned or not, in evaluation mode, and compare the file's outputs with the model's.

    The batch has any size, and so have sequences of tokens, where the model allows it. Types of numbers stay, and so do
    memory formats where the file can hold them, which ONNX cannot. The comparison is of the example inputs and of
    inputs of another batch and length; its figures are in the file's metadata.

    Args:
        small: The module. It stays as it is.
        path: The file to write; an existing one is replaced as a whole. For ``"hf"`` a folder; other files in it stay.
        example: A tensor, a tuple of positional inputs, or a dict of keyword inputs; None for the model's own.
        format: ``"onnx"``, compared under onnxruntime; ``"torch"``, a program of ``torch.export``, compared after it is
            loaded again; or ``"hf"``, a folder for `autoprune.from_pretrained`, for models of transformers, which then
            gives the same outputs to the last bit. None goes by the ending of `path`: ``.onnx`` or ``.pt2``.
        tolerance: Largest difference of an output as a fraction of its largest value; by default 1e-4 for float32.

    Returns:
        What was written, with the differences measured.

    Raises:
        UnsupportedModelError: If the model cannot be exported, with the operation; or outputs differ. No file is
            written then, and one in its place stays.
        ValueError: If an argument has another form.
        ImportError: If a library of the format is missing.
        OSError: If the file cannot be written.
    """
    small = unwrap(small)
    tolerance = checked_tolerance(tolerance)
    target = as_path(path)
    format = format_of(target, format)  # noqa: A001
    if format == "hf":
        return _export_folder(small, target, example)
    write = _writer(format)
    with replacing(target) as fresh:  # so that a path that cannot be written fails first
        call = Call.of(small, example)
        program = traced(call)
        try:
            parity = write(program, fresh, tolerance)
        except UnsupportedModelError as error:
            if not program.dynamic:
                raise
            program = traced(call.fixed(0, 1), (f"all sizes are fixed, because otherwise {brief(ValueError(error))}",))
            parity = write(program, fresh, tolerance)
    return Exported(target, format, parity, program.dynamic, program.notes)


def _export_folder(small: nn.Module, folder: Path, example: ExampleInputs | None) -> Exported:
    from autoprune.result.pretrained.writing import require_pretrained, write_pretrained

    require_pretrained(small)
    call = Call.of(build(small, Edit({}, {})), example)  # a copy: addresses of weights may change the rounding
    expected = call.run()

    def equal(loaded: nn.Module) -> Parity:
        found = call.outputs_of(lambda *args, **kwargs: loaded(*args, **kwargs, **call.constants))
        return compare([expected], [found], f"{call.name} loaded from its folder", 0.0)

    parity, notes = write_pretrained(small, folder, equal)
    return Exported(folder, "hf", parity, {}, notes)


def format_of(path: Path, given: str | None) -> str:
    """Format to write: the one given, or that of the ending.

    Raises:
        ValueError: If it is unknown.
    """
    if given is not None:
        return one_of("format", given, FORMATS)
    if path.suffix not in ENDINGS:
        raise ValueError(
            f"format must be given, one of {list(FORMATS)}, where path ends in none of {list(ENDINGS)}, got "
            f"{shortened(path)}"
        )
    return ENDINGS[path.suffix]


def _writer(format: str) -> Callable[[Program, Path, float | None], Parity]:  # noqa: A002
    if format == "torch":
        return write_program
    from autoprune.result.exporting.onnx_file import write_onnx

    return write_onnx
