"""Prompt lookup decoding: draft the tokens that followed the last few tokens the previous time.

Decoding is memory-bound, and one pass reads the weights for several tokens in little more time than for one. So a few
guessed tokens, the draft, go through the network together with the last token. They are accepted up to the first that
the sampler does not take:

    … the cat sat on the mat . The dog saw the cat sat on          the last tokens were here before:
          └──────────┘ └─────┘                 └──────────┘        draft what followed them, "the mat ."
    one pass:   on → the ✓   the → mat ✓   mat → !                 "." is not what the network predicts: rejected

The result is bit-identical to decoding without drafts, see `Engine.verify`.

Source: Leviathan et al. 2022, arXiv:2211.17192, here with the text itself in place of a small model: prompt lookup
decoding, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

# Lengths of the n-grams that are looked up.
_MAX_NGRAM, _MIN_NGRAM = 4, 2
# Correct guesses in a row before a token is computed ahead. A wrong guess divides the streak.
_MIN_STREAK, _STREAK_DIVISOR = 2, 3
# The balance of gains and losses, in passes for a single token. It begins with a small credit, earns a share of each
# pass, and is limited, so that a text that no longer repeats itself does not spend all gains of before.
_INITIAL_BALANCE, _ALLOWED_LOSS, _MAX_BALANCE = 0.5, 0.01, 4.0
# Cost of a drafted token, in passes for a single token, until it is measured.
_INITIAL_ROW_COST = 0.25
# Weight of the newest value in a moving average.
_NEWEST_WEIGHT = 0.2


class NGramDrafter:
    """Drafts tokens that may follow a text: as many as were guessed correctly before, and none if drafts do not pay.

    Every next token is guessed and compared with the actual one, even if no draft is computed: that costs next to
    nothing and says when to begin. The cost of a pass with a draft, compared to passes for single tokens, is recorded.
    The balance never falls far below zero, so a text that does not repeat itself loses about `_ALLOWED_LOSS` of its
    time.

    Finding a draft takes constant time in the length of the text.
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
        """Return the tokens to compute ahead; none if guesses were wrong or do not pay.

        Args:
            ids: The text so far, which grows with each call.
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
        """Record a pass: the number of drafted tokens, how many of them were accepted, and its time in seconds."""
        if not drafted:
            # A pass that something else delayed says little about the next one.
            self._single_s = _average(self._single_s, min(seconds, 2 * self._single_s)) if self._single_s else seconds
            self._balance = min(_MAX_BALANCE, self._balance + _ALLOWED_LOSS)
            return
        # A row does not cost more than a pass of its own.
        took = min(seconds / self._single_s, 1.0 + drafted)
        self._row = max(0.01, _average(self._row, (took - 1) / drafted))
        self._balance = max(-_INITIAL_BALANCE, min(_MAX_BALANCE, self._balance + accepted + 1 - took))

    def _push(self, id: int) -> None:
        """Append a token of the text, and look up the guess at the next one."""
        source = self._source
        right = source is not None and self._ids[source] == id
        self._streak = self._streak + 1 if right else self._streak // _STREAK_DIVISOR
        self._ids.append(id)
        end = len(self._ids)
        ngrams = [tuple(self._ids[end - n :]) for n in range(min(_MAX_NGRAM, end), _MIN_NGRAM - 1, -1)]
        # If no n-gram occurred before, the token may replace the guessed one: guess what followed that one.
        replaced = None if source is None else source + 1
        self._source = next((self._after[ngram] for ngram in ngrams if ngram in self._after), replaced)
        for ngram in ngrams:
            self._after[ngram] = end


def _average(before: float, newest: float) -> float:
    return before + _NEWEST_WEIGHT * (newest - before)
