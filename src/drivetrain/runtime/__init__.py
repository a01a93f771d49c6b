"""Jobs across processes: workers, replicas, moves and failover."""

from drivetrain.runtime.runtime import Job, Runtime

__all__ = ["Job", "Runtime"]
