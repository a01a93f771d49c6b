"""What ties a PyTorch program to one vendor, read from its text. Nothing is run or imported, and
torch need not be installed."""

from drivetrain.pytorch.porting.reading import Finding, needed_devices, read
from drivetrain.pytorch.porting.scan import Report, analyse

__all__ = ["Finding", "Report", "analyse", "needed_devices", "read"]
