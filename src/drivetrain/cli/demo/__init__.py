"""``drivetrain demo``: train, move, kill, compare, and show it."""
