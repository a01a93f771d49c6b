"""Which device gets a workload, and why."""
