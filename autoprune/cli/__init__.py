"""Command line: ``autoprune inspect``, ``search``, ``front``, ``report``, ``build`` and ``profile``."""
