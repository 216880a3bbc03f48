"""Importance scores. Methods §2."""

from stages.criteria.equations import CRITERIA
from stages.criteria.scoring import check_criterion, check_options, find_criterion, score, score_rows

__all__ = ["CRITERIA", "check_criterion", "check_options", "find_criterion", "score", "score_rows"]
