"""Results and pictures in, one self-contained HTML page or a contact sheet out."""

from cvmatch.report.charts import Curve
from cvmatch.report.evaluation import evaluation
from cvmatch.report.page import Page, Trial, html, provenance, report
from cvmatch.report.scores import Score, score_table, scores
from cvmatch.report.sheet import Example, Tile, retrieval_sheet

__all__ = [
    "Curve",
    "Example",
    "Page",
    "Score",
    "Tile",
    "Trial",
    "evaluation",
    "html",
    "provenance",
    "report",
    "retrieval_sheet",
    "score_table",
    "scores",
]
