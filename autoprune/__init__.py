"""Search how much of each layer of a PyTorch model to remove."""

from autoprune.audit.audit import audit
from autoprune.audit.shortlist import Shortlist, shortlist
from autoprune.budget import Budget
from autoprune.costs.latency.model import Latency
from autoprune.costs.latency.profile import profile
from autoprune.data.subsets import Data
from autoprune.early_stopping.racing import Racing
from autoprune.early_stopping.successive_halving import Rungs
from autoprune.errors import (
    AutopruneError,
    BudgetError,
    DataError,
    FileFormatError,
    InfeasibleBudgetError,
    NothingToPruneError,
    RecipeError,
    StructureCheckError,
    UnsupportedModelError,
)
from autoprune.evaluators.recovery.receipt import Recovered
from autoprune.evaluators.recovery.recover import recover
from autoprune.evaluators.recovery.recovery import Recovery
from autoprune.execution import Execution
from autoprune.inspection import Inspection, inspect
from autoprune.metrics.metric import Metric
from autoprune.protocols import Pruning
from autoprune.result import SearchResult
from autoprune.result.audit_report import Audit
from autoprune.result.exporting.export import export
from autoprune.result.pretrained.folder import from_pretrained
from autoprune.result.recipe import load, save
from autoprune.result.trials import Trial
from autoprune.search import search
from autoprune.search_spaces import Channels, Product, Sparsity, register_space
from autoprune.structure.call import Call
from autoprune.structure.rules import register_rule
from autoprune.structure.slicing.adapters import register_adapter
from autoprune.study.plan import Plan, plan
from autoprune.study.start import Start

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "AutopruneError",
    "Budget",
    "BudgetError",
    "Call",
    "Channels",
    "Data",
    "DataError",
    "Execution",
    "FileFormatError",
    "InfeasibleBudgetError",
    "Inspection",
    "Latency",
    "Metric",
    "NothingToPruneError",
    "Plan",
    "Product",
    "Pruning",
    "Racing",
    "RecipeError",
    "Recovered",
    "Recovery",
    "Rungs",
    "SearchResult",
    "Shortlist",
    "Sparsity",
    "Start",
    "StructureCheckError",
    "Trial",
    "UnsupportedModelError",
    "audit",
    "export",
    "from_pretrained",
    "inspect",
    "load",
    "plan",
    "profile",
    "recover",
    "register_adapter",
    "register_rule",
    "register_space",
    "save",
    "search",
    "shortlist",
]
