"""Importance scores. stages/README.md §2."""

from espalier.stages.criteria.equations import CRITERIA
from espalier.stages.criteria.scoring import check_criterion, check_options, find_criterion, score, score_rows

__all__ = ["CRITERIA", "check_criterion", "check_options", "find_criterion", "score", "score_rows"]
