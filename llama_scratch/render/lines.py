"""Machine-readable answers: tab-separated lines and JSON Lines."""

from __future__ import annotations

import json
from typing import Any

from llama_scratch.results import Candidate, Prediction


def json_line(value: Any) -> str:
    """Serialize a value as JSON on one line."""
    return json.dumps(value, ensure_ascii=False)


def candidate_line(candidate: Candidate) -> str:
    r"""Format a candidate: the token as a JSON string, its probability and its id.

    >>> candidate_line(Candidate(7042, " Paris", -0.2574))
    '" Paris"\t0.7731\t7042'
    """
    return f"{json_line(candidate.text)}\t{candidate.probability:.4f}\t{candidate.id}"


def answer_lines(prediction: Prediction, *, all_candidates: bool) -> list[str]:
    """Format a prediction, one candidate per line.

    Args:
        prediction: The prediction.
        all_candidates: Whether to include all candidates instead of only the first.
    """
    return [candidate_line(candidate) for candidate in (prediction.top if all_candidates else prediction.top[:1])]
