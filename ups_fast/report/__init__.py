"""What a run leaves for people: pseudo_labels.csv, report.png and report.html.

All of it comes from the rows of the rounds and from the last labeling. Where the truth of unlabeled images
is not known (-1), what would need it is left out, and the report says so.
"""

from __future__ import annotations

from ups_fast.report.comparison import Comparison, Samples, baselines_of, verdict
from ups_fast.report.examples import examples
from ups_fast.report.page import write_report
from ups_fast.report.sentences import advice, headline, recall_line, test_guess
from ups_fast.report.table import label_rows, label_table, write_pseudo_labels
from ups_fast.report.to_review import Review, write_review

__all__ = [
    "Comparison",
    "Review",
    "Samples",
    "advice",
    "baselines_of",
    "examples",
    "headline",
    "label_rows",
    "label_table",
    "recall_line",
    "test_guess",
    "verdict",
    "write_pseudo_labels",
    "write_report",
    "write_review",
]
