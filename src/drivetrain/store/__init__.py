"""What outlives a process: the state folder, journals, and SQLite for history and leases."""
