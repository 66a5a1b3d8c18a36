"""Errors that users may want to catch by name; every message names the argument, the value and the way out."""

from __future__ import annotations


class AutopruneError(Exception):
    """Base class of the errors defined here."""


class BudgetError(AutopruneError, ValueError):
    """A budget that cannot be read, or that names an unknown cost."""


class InfeasibleBudgetError(AutopruneError, ValueError):
    """A budget that no candidate of the space can meet, or that no trial of a result met."""


class NothingToPruneError(AutopruneError, ValueError):
    """A model without a group of units that can be removed; the message lists the reasons."""


class UnsupportedModelError(AutopruneError, TypeError):
    """A model of a kind that cannot be sliced: scripted, quantised, or spread over several devices."""


class StructureCheckError(AutopruneError, RuntimeError):
    """A check of the traced structure failed and ``checks="strict"`` asked to stop."""


class DataError(AutopruneError, ValueError):
    """Data that cannot be used: empty, without the labels that a metric needs, or of an unknown form."""


class FileFormatError(AutopruneError, ValueError):
    """A file that is corrupted, of a foreign format or another version, or was made for another model.

    The message is cut in its middle to 500 characters: the wrong entry of a file may be as long as the file.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= 500 else f"{message[:330]} ... {message[-160:]}")


RecipeError = FileFormatError
"""Former name of `FileFormatError`, from when only recipes were checked."""
