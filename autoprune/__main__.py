"""``python -m autoprune`` does what the command ``autoprune`` does."""

from autoprune.cli import app

app(prog_name="autoprune")
