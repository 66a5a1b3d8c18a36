"""Pictures of a search, on axes of matplotlib."""

from autoprune.result.plots.audit import plot_audit
from autoprune.result.plots.convergence import plot_convergence
from autoprune.result.plots.front import plot_front
from autoprune.result.plots.layers import plot_layers
from autoprune.result.plots.sensitivity import plot_sensitivity

__all__ = ["plot_audit", "plot_convergence", "plot_front", "plot_layers", "plot_sensitivity"]
