"""Loggers: CSV always; Weights & Biases, TensorBoard and MLflow by choice. Their libraries are imported when chosen."""

from diffx.training.loggers.csv_file import CSVLogger
from diffx.training.loggers.mlflow_tracker import MLflowTracker
from diffx.training.loggers.tensorboard_tracker import TensorBoardTracker
from diffx.training.loggers.tracked import Tracked, log_image, trackers
from diffx.training.loggers.tracker import About, Tracker
from diffx.training.loggers.wandb_tracker import WandbTracker, has_key, reachable

__all__ = [
    "About",
    "CSVLogger",
    "MLflowTracker",
    "TensorBoardTracker",
    "Tracked",
    "Tracker",
    "WandbTracker",
    "has_key",
    "log_image",
    "reachable",
    "trackers",
]
