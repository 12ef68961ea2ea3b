"""Reports: a training run as plain data (``Run``), and as one HTML file that needs nothing else."""

from .html import write_report
from .run import Example, Run, Step

__all__ = ["Example", "Run", "Step", "write_report"]
