"""From the files of a run to what people read: HTML page, terminal table, overview picture.

`dsg.report.features` and the writers in `dsg.report.files` are imported from where they are.
"""

from dsg.report.build import build_report, save_overview_png
from dsg.report.tables import results_table

__all__ = ["build_report", "results_table", "save_overview_png"]
