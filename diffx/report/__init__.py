"""A report: one page that answers the question of a sweep, with everything behind the answer."""

from diffx.report.compared import Verdicts, verdicts_of, without_verdicts
from diffx.report.report import write_report

__all__ = ["Verdicts", "verdicts_of", "without_verdicts", "write_report"]
