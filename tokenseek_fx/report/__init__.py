"""Reports: a training run as plain data (``Run``) and as one self-contained HTML file."""

from .html import write_report
from .recorded import example_of, memory_of, run_of
from .run import Example, Run, Step

__all__ = ["Example", "Run", "Step", "example_of", "memory_of", "run_of", "write_report"]
