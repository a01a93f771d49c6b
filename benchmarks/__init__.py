"""Times and ratios: each ``bench_*.py`` prints its numbers and ends 1 on a miss."""
