"""`famba report RUNS... --out FOLDER`: the paper's table from one's own runs, with pictures.

Reads run folders and nothing else.
"""

from famba.analysis.report.contents import Report, gather
from famba.analysis.report.output import summary, write_report

__all__ = ["Report", "gather", "summary", "write_report"]
