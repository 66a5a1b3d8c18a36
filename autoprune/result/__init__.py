"""Results of a search: trials, the front, built and saved modules, tables and pictures."""

from autoprune.metrics.statistics import Evaluation
from autoprune.result.search_result import SearchResult
from autoprune.result.trials import Trial

__all__ = ["Evaluation", "SearchResult", "Trial"]
