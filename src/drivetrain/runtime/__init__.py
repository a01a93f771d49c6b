"""Jobs across processes: workers, replicas, moves and failover."""

from drivetrain.runtime.job import Job
from drivetrain.runtime.runtime import Runtime

__all__ = ["Job", "Runtime"]
