"""``python -m autoprune`` does what the command ``autoprune`` does."""

from autoprune.cli.app import app

app(prog_name="autoprune")
