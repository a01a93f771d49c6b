"""What people type: the ``drivetrain`` command."""
