"""Report of a search: one web page that holds its data, loads nothing, and is the same while a search runs."""

from autoprune.result.report.page import page_of, write_report

__all__ = ["page_of", "write_report"]
