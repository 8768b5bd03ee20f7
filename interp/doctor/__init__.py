"""The model doctor: what works on a model, what does not, and what it will cost."""

from interp.doctor.examine import examine, examine_model
from interp.doctor.report import ALL_RIGHT, CLOSED, LIMITS, Report
from interp.doctor.text import write

__all__ = ["ALL_RIGHT", "CLOSED", "LIMITS", "Report", "examine", "examine_model", "write"]
