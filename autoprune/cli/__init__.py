"""Command line: ``autoprune inspect``, ``search``, ``front``, ``build`` and ``profile``."""
