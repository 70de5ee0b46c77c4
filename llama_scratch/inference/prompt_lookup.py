"""Prompt lookup decoding: draft tokens from an earlier occurrence in the text.

Decoding is memory-bound: a forward pass for several tokens takes little more time than for one. Therefore, a few
guessed tokens, the draft, go through the network together with the last token. They are accepted up to the first one
that differs from the sampled token:

    … the cat sat on the mat . The dog saw the cat sat on          the last tokens occurred before, followed
          └──────────┘ └─────┘                 └──────────┘        by "the mat .", which becomes the draft
    one pass:   on → the ✓   the → mat ✓   mat → !                 the network does not predict ".": rejected

The result is bit-identical to decoding without drafts, see `Engine.verify`.

Sources: Leviathan et al. 2022, arXiv:2211.17192 (speculative decoding); Saxena 2023, with the text itself in place of
a draft model, github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

# Lengths of the n-grams to look up.
_MAX_NGRAM, _MIN_NGRAM = 4, 2
# Consecutive correct guesses required for a draft, and the divisor of this streak after a wrong guess.
_MIN_STREAK, _STREAK_DIVISOR = 2, 3
# The balance of time saved and lost by drafts, in units of a single-token pass: its initial value, its increase per
# pass without a draft, and its maximum. The maximum limits the loss when a text stops repeating itself.
_INITIAL_BALANCE, _ALLOWED_LOSS, _MAX_BALANCE = 0.5, 0.01, 4.0
# Initial estimate of the cost of a drafted token, in units of a single-token pass.
_INITIAL_ROW_COST = 0.25
# Weight of the newest value in a moving average.
_NEWEST_WEIGHT = 0.2


class NGramDrafter:
    """Drafts tokens that may follow a text, as long as drafts save time.

    A draft is at most as long as the current streak of correct guesses. Every next token is guessed and compared with
    the actual one, even without a draft, because that costs almost nothing and shows when to start. The balance
    compares the cost of passes with drafts to that of single-token passes. It never falls far below zero, so decoding a
    text that does not repeat itself takes only about 1 % longer (`_ALLOWED_LOSS`).

    The time to find a draft does not depend on the length of the text.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        # For each n-gram, the position after its last occurrence.
        self._after: dict[tuple[int, ...], int] = {}
        self._source: int | None = None  # position of the guess at the next token
        self._streak = 0
        self._single_s = 0.0
        self._row = _INITIAL_ROW_COST
        self._balance = _INITIAL_BALANCE

    def propose(self, ids: Sequence[int], max_length: int) -> list[int]:
        """Return a draft, empty if recent guesses were wrong or drafts save no time.

        Args:
            ids: The tokens so far. They begin with the tokens of the previous call.
            max_length: Maximum number of tokens.
        """
        for id in ids[len(self._ids) :]:
            self._push(id)
        if self._source is None or self._streak < _MIN_STREAK or not self._single_s:
            return []
        followed = self._ids[self._source :]
        count = min(self._streak, max_length, int(self._balance / self._row))
        return [followed[i % len(followed)] for i in range(count)]  # wraps around at the end of the text

    def record_cost(self, drafted: int, accepted: int, seconds: float) -> None:
        """Record a forward pass.

        Args:
            drafted: Number of drafted tokens.
            accepted: Number of accepted tokens.
            seconds: Duration of the pass.
        """
        if not drafted:
            # Limit the effect of outliers, such as a pass delayed by another program.
            self._single_s = _average(self._single_s, min(seconds, 2 * self._single_s)) if self._single_s else seconds
            self._balance = min(_MAX_BALANCE, self._balance + _ALLOWED_LOSS)
            return
        # Outliers again: a drafted token never costs more than a pass of its own.
        took = min(seconds / self._single_s, 1.0 + drafted)
        self._row = max(0.01, _average(self._row, (took - 1) / drafted))
        self._balance = max(-_INITIAL_BALANCE, min(_MAX_BALANCE, self._balance + accepted + 1 - took))

    def _push(self, id: int) -> None:
        """Append a token to the text, and guess the next one."""
        source = self._source
        right = source is not None and self._ids[source] == id
        self._streak = self._streak + 1 if right else self._streak // _STREAK_DIVISOR
        self._ids.append(id)
        end = len(self._ids)
        ngrams = [tuple(self._ids[end - n :]) for n in range(min(_MAX_NGRAM, end), _MIN_NGRAM - 1, -1)]
        # If no n-gram occurred before, assume that this token replaces the guessed one, and continue after that.
        replaced = None if source is None else source + 1
        self._source = next((self._after[ngram] for ngram in ngrams if ngram in self._after), replaced)
        for ngram in ngrams:
            self._after[ngram] = end


def _average(before: float, newest: float) -> float:
    return before + _NEWEST_WEIGHT * (newest - before)
