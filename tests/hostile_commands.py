"""Every command with a wrong word for one of its options, and what it came to."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from autoprune.cli.app import app
from tests.hostile import deadline, judged, restored, simulated_clock

COMMANDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "search": (
        ["MODEL"],
        {
            "--budget": "flops <= 60%", "--run-dir": "run", "--data": "m.py:data", "--weights": "", "--trials": "1",
            "--max-seconds": "", "--seed": "0", "--metric": "", "--optimizer": "random", "--evaluator": "adaptive_bn",
            "--criterion": "l2", "--round-to": "", "--ignore": "", "--executor": "local", "--workers": "",
            "--gpus-per-worker": "", "--latency": "", "--cost-batch": "", "--rewrite": "", "--input-shape": "",
            "--example": "",
        },
    ),
    "front": (["RUN_DIR"], {"--plot": ""}),
    "build": (
        ["RUN_DIR"], {"--model": "m.py:model", "--output": "built.safetensors", "--budget": "", "--trial": ""}
    ),
    "inspect": (["MODEL"], {"--rewrite": "", "--input-shape": "2,8", "--example": ""}),
    "profile": (
        ["MODEL"],
        {
            "--output": "t.json", "--batch": "", "--device": "", "--threads": "", "--runtime": "",
            "--input-shape": "2,8", "--example": "",
        },
    ),
}  # fmt: skip
"""Positional arguments and options of each command, with what is right for them; empty where they are left out."""

WORDS = (
    "", "nonsense", "-1", "0", "1.5", "nan", "1e400", "9" * 30, "x" * 5_000, "no.json", ".", "m.py", "m.py:five",
    "m.py:none", "m.py:data", "m.py:raises", "m.py:needs", "no.py:model", "os:getcwd", "2,3", "2,0", "9" * 9 + ",8",
    "cuda:99", "meta", "\u00e9\n", "None", "[]", "small.safetensors", "result", "1/0", "flops", "auto",
)  # fmt: skip
"""Words given to any option of a command."""

TAKEN = {
    "search --data": ("m.py:data",),
    "search --trials": ("9" * 30, "auto"),
    "search --max-seconds": ("1.5", "9" * 30),
    "search --seed": ("0",),
    "search --ignore": ("0",),
    "search --gpus-per-worker": ("0",),
    "search --cost-batch": ("9" * 30,),
    **{f"search --{name}": ("auto",) for name in ("metric", "optimizer", "evaluator", "criterion", "rewrite")},
    "inspect --rewrite": ("auto",),
    **{f"{name} RUN_DIR": ("result",) for name in ("front", "build")},
    **{f"{name}": WORDS for name in ("search --run-dir", "build --output", "profile --output", "front --plot")},
}
"""Words that an option takes, by design: those that are written to take nearly any name."""

ALIASES = {"input-shape": ("example",), "RUN_DIR": ("run_dir", "path must be")}
"""Names of options in messages of the library."""

LEFT_OUT = (("search --round-to", "auto"),)  # which measures latencies
MODULE = """
from tests.damaging import model
from tests.hostile import X, Y

five = 5

def data():
    return X, Y

def raises():
    raise ValueError("raises, as this function of the user does")

def needs(argument):
    return argument
"""


@dataclass(frozen=True)
class Command:
    """A command line with one wrong word.

    Attributes:
        name: The command.
        option: What is wrong: an option, or the positional argument.
        word: What it is given.
    """

    name: str
    option: str
    word: str

    def __str__(self) -> str:
        return f"autoprune {self.name} {self.option} {self.word[:30]!r}"


def make_module(folder: Path) -> None:
    """Make the files that command lines name; `make_calls` makes the others."""
    (folder / "m.py").write_text(MODULE)


def commands() -> Iterator[Command]:
    """Every word for every option of every command."""
    for name, (positional, options) in COMMANDS.items():
        for option in (*positional, *options):
            for word in WORDS:
                if (f"{name} {option}", word) not in LEFT_OUT:
                    yield Command(name, option, word)


def answer(command: Command) -> tuple[str, str]:
    """Judge a command line in the current folder, which is restored; see `outcome`."""
    with restored():
        return _answer(command)


def _answer(command: Command) -> tuple[str, str]:
    positional, options = COMMANDS[command.name]
    right = {"MODEL": "m.py:model", "RUN_DIR": "result"}
    arguments = [command.word if name == command.option else right[name] for name in positional]
    for option, value in options.items():
        word = command.word if option == command.option else value
        arguments += [option, word] if word or option == command.option else []
    with deadline(), simulated_clock():
        try:
            found = CliRunner().invoke(app, [command.name, *arguments])
        except BaseException as error:  # of any kind is what this looks for
            return "WRONG", f"{type(error).__name__}: {error}"
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        own = "as this function of the user does" in str(found.exception)
        return ("refused" if own else "WRONG"), f"{type(found.exception).__name__}: {found.exception}"
    if found.exit_code == 0:
        taken = command.word in TAKEN.get(f"{command.name} {command.option}", ())
        return ("accepted", "") if taken else ("WRONG", "took it without a word")
    name = command.option.lstrip("-")
    words = [name, name.replace("-", "_"), re.escape(command.word[:20]) or name]
    words += ALIASES.get(name, ())
    return judged(found.stderr.strip().splitlines()[-1], words)
