"""Benchmarks of floor 1: each line names its start, its end, its peer and its floor."""
