"""Trackers: callbacks that write a search to MLflow, TensorBoard or Weights & Biases; each imports its own package."""

from autoprune.execution.trackers.mlflow import MLflow
from autoprune.execution.trackers.tensorboard import TensorBoard
from autoprune.execution.trackers.wandb import WeightsAndBiases

__all__ = ["MLflow", "TensorBoard", "WeightsAndBiases"]
