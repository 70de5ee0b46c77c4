"""Prompt lookup: text repeats itself, so what followed the last words the time before is a guess at what follows now.

Decoding is bound by reading the weights, and one pass reads them for several tokens at the price of little more than
one. So a few guessed tokens, the draft, go through the network together with the last one, and are kept as far as
each is the token that the sampler takes there anyway:

    … the cat sat on the mat . The dog saw the cat sat on          the last tokens stood here before:
          └──────────┘ └─────┘                 └──────────┘        draft what followed them, "the mat ."
    one pass:   on → the ✓   the → mat ✓   mat → !                 "." is not what the network says: it goes

No token comes out that would not have come without it; see `Engine.verify` for why that holds to the last bit.

Source: Leviathan et al. 2022, arXiv:2211.17192, here with the text itself in place of a small model: prompt lookup
decoding, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

# Lengths of the runs of tokens that are looked up.
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
    """Guesses at what follows a text, as many as the last ones were right, and none where they do not pay.

    Each token is guessed and the guess compared with what came, also where no draft is computed: that costs next to
    nothing and says when to begin. What a pass with a draft took, against passes for single tokens, is booked: the
    balance never goes far below zero, so a text that does not repeat itself loses about `_ALLOWED_LOSS` of its time.

    Finding a draft takes the same time however long the text is.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        # For each run of tokens, where what followed it stands; the last time that it came.
        self._behind: dict[tuple[int, ...], int] = {}
        self._source: int | None = None  # where the guess at the next token stands
        self._streak = 0
        self._single_s = 0.0
        self._row = _INITIAL_ROW_COST
        self._balance = _INITIAL_BALANCE

    def propose(self, ids: Sequence[int], room: int) -> list[int]:
        """The tokens to compute ahead, at most `room`; none where the guesses were wrong or do not pay.

        ids: the text so far, which goes on with each call.
        """
        for id in ids[len(self._ids) :]:
            self._push(id)
        if self._source is None or self._streak < _MIN_STREAK or not self._single_s:
            return []
        followed = self._ids[self._source :]
        count = min(self._streak, room, int(self._balance / self._row))
        return [followed[i % len(followed)] for i in range(count)]  # what goes round ends here

    def record_cost(self, drafted: int, accepted: int, seconds: float) -> None:
        """What a pass took, how many tokens were drafted for it and how many of them the sampler took as well."""
        if not drafted:
            # One pass that something else delayed says little about the next.
            self._single_s = _average(self._single_s, min(seconds, 2 * self._single_s)) if self._single_s else seconds
            self._balance = min(_MAX_BALANCE, self._balance + _ALLOWED_LOSS)
            return
        # No row costs more than a pass of its own.
        took = min(seconds / self._single_s, 1.0 + drafted)
        self._row = max(0.01, _average(self._row, (took - 1) / drafted))
        self._balance = max(-_INITIAL_BALANCE, min(_MAX_BALANCE, self._balance + accepted + 1 - took))

    def _push(self, id: int) -> None:
        """The text goes on with this token."""
        source = self._source
        right = source is not None and self._ids[source] == id
        self._streak = self._streak + 1 if right else self._streak // _STREAK_DIVISOR
        self._ids.append(id)
        end = len(self._ids)
        runs = [tuple(self._ids[end - n :]) for n in range(min(_MAX_NGRAM, end), _MIN_NGRAM - 1, -1)]
        # A token that never came like this may stand in the place of another: what followed that one is the guess.
        beside = None if source is None else source + 1
        self._source = next((self._behind[run] for run in runs if run in self._behind), beside)
        for run in runs:
            self._behind[run] = end


def _average(before: float, newest: float) -> float:
    return before + _NEWEST_WEIGHT * (newest - before)
