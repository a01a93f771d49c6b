"""The training loop that can change its device."""

from drivetrain.errors import Moved, Retry
from drivetrain.training.arguments import device_for_this_job
from drivetrain.training.job import TrainingJob
from drivetrain.training.step import Step

__all__ = ["Moved", "Retry", "Step", "TrainingJob", "device_for_this_job"]
