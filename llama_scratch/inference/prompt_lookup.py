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

# The longest and the shortest run of tokens that is looked up.
_LONGEST, _SHORTEST = 4, 2
# So many guesses in a row must have been right before one is computed ahead; a wrong one leaves a third of them.
_STREAK, _LEFT = 2, 3
# What may be lost, in passes for a single token: at first, and as a share of what the text took; and what is kept of
# the gains, so that a text that no longer repeats itself does not use them all up.
_START, _SHARE, _KEPT = 0.5, 0.01, 4.0
# What a drafted token adds to a pass, in passes for a single token, before it was measured.
_ROW = 0.25
# How much of an average is the newest value.
_NEWEST = 0.2


class NGramDrafter:
    """Guesses at what follows a text, as many as the last ones were right, and none where they do not pay.

    Each token is guessed and the guess compared with what came, also where no draft is computed: that costs next to
    nothing and says when to begin. What a pass with a draft took, against passes for single tokens, is booked: the
    balance never goes far below zero, so text that does not repeat itself loses about `_SHARE` of its time at most.

    Finding a draft takes the same time however long the text is.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        # For each run of tokens, where what followed it stands; the last time that it came.
        self._behind: dict[tuple[int, ...], int] = {}
        self._source: int | None = None  # where the guess at the next token stands
        self._streak = 0
        self._single_s = 0.0
        self._row = _ROW
        self._balance = _START

    def propose(self, ids: Sequence[int], room: int) -> list[int]:
        """The tokens to compute ahead, at most `room`; none where the guesses were wrong or do not pay.

        ids: the text so far, which goes on with each call.
        """
        for id in ids[len(self._ids) :]:
            self._push(id)
        if self._source is None or self._streak < _STREAK or not self._single_s:
            return []
        followed = self._ids[self._source :]
        count = min(self._streak, room, int(self._balance / self._row))
        return [followed[i % len(followed)] for i in range(count)]  # what goes round ends here

    def record_cost(self, drafted: int, accepted: int, seconds: float) -> None:
        """What a pass took, how many tokens were drafted for it and how many of them the sampler took as well."""
        if not drafted:
            # One pass that something else delayed says little about the next.
            self._single_s = _average(self._single_s, min(seconds, 2 * self._single_s)) if self._single_s else seconds
            self._balance = min(_KEPT, self._balance + _SHARE)
            return
        # No row costs more than a pass of its own.
        took = min(seconds / self._single_s, 1.0 + drafted)
        self._row = max(0.01, _average(self._row, (took - 1) / drafted))
        self._balance = max(-_START, min(_KEPT, self._balance + accepted + 1 - took))

    def _push(self, id: int) -> None:
        """The text goes on with this token."""
        source = self._source
        right = source is not None and self._ids[source] == id
        self._streak = self._streak + 1 if right else self._streak // _LEFT
        self._ids.append(id)
        end = len(self._ids)
        runs = [tuple(self._ids[end - n :]) for n in range(min(_LONGEST, end), _SHORTEST - 1, -1)]
        # A token that never came like this may stand in the place of another: what followed that one is the guess.
        beside = None if source is None else source + 1
        self._source = next((self._behind[run] for run in runs if run in self._behind), beside)
        for run in runs:
            self._behind[run] = end


def _average(before: float, newest: float) -> float:
    return before + _NEWEST * (newest - before)
