"""Which slot a session gets, and how much of what lies there it need not read again. Pure.

A slot keeps the keys and values of what was read in it until somebody else needs it: the next turn
of a conversation then reads only what is new. A key depends on the tokens up to its own and on the
kernel that computed it, so whoever shares both shares its bits (docs/decisions/0015-prefixes.md).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Final

import msgspec

from aivillage.models.inference.tokenizer import Prompt


class Kept(msgspec.Struct, frozen=True):
    """Tokens whose keys lie in a slot: `prompt_tokens` of them read as a prompt, the rest drawn.

    `scope`: who may find out that they are there; what a buyer wrote is no other buyer's to know.
    """

    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    scope: bytes = b""


NOTHING: Final = Kept()


class Wanted(msgspec.Struct, frozen=True):
    """What a session is to read; its first `open_tokens` are nobody's words: the template's."""

    token_ids: tuple[int, ...]
    prompt_tokens: int
    open_tokens: int
    scope: bytes


class Place(msgspec.Struct, frozen=True):
    """A free slot, and the free one whose first `tokens` keys are those of the session."""

    slot: int
    source: int
    tokens: int


def to_read(prompt: Prompt, delivered: Sequence[int], scope: bytes) -> Wanted:
    """Prompt and delivered tokens; before its first byte of content a prompt is the template's."""
    return Wanted(
        token_ids=(*prompt.token_ids, *delivered),
        prompt_tokens=len(prompt.token_ids),
        open_tokens=bisect.bisect_right(prompt.content_bytes, 0),
        scope=scope,
    )


class Slots:
    """The free slots and what each keeps, the longest unused first."""

    def __init__(self, count: int, *, keeps: bool, drawn_as_prompt: bool) -> None:
        """`drawn_as_prompt`: a drawn token's keys have the bits of one that was read.

        Without `keeps` nothing is ever found: keys whose bits depend on their company are no use.
        """
        self._keeps = keeps
        self._drawn_as_prompt = drawn_as_prompt
        self._free = dict.fromkeys(range(count), NOTHING)

    def __len__(self) -> int:
        return len(self._free)

    def place(self, session: Wanted) -> Place:
        """Where `session` has to read least; takes nothing. There must be a free slot.

        It goes on in the slot that it found where that is its own conversation. Else what it found
        is copied, so that conversations that only begin alike do not put each other out.
        """
        shared = {slot: self._shared(kept, session) for slot, kept in self._free.items()}
        source = max(shared, key=shared.__getitem__)  # of equals the longest unused
        if not shared[source]:
            slot = self.oldest()
            return Place(slot, slot, 0)
        slot = source if _goes_on(self._free[source], session) else self.oldest(but=source)
        return Place(slot, source, shared[source])

    def oldest(self, *, but: int | None = None) -> int:
        """An empty slot, else the longest unused one; `but` only where there is no other."""
        slots = [slot for slot in self._free if slot != but] or list(self._free)
        return min(slots, key=lambda slot: bool(self._free[slot].token_ids))

    def take(self, slot: int) -> None:
        del self._free[slot]

    def give_back(self, slot: int, kept: Kept) -> None:
        self._free[slot] = kept if self._keeps else NOTHING

    def _shared(self, kept: Kept, session: Wanted) -> int:
        """How many of its first tokens a session need not read; the last one draws, so never all.

        A token that was drawn here and is prompt there went through another kernel.
        """
        same = _common(kept.token_ids, session.token_ids)
        if not self._drawn_as_prompt and kept.prompt_tokens != session.prompt_tokens:
            same = min(same, kept.prompt_tokens, session.prompt_tokens)
        if kept.scope != session.scope:
            same = min(same, session.open_tokens)
        return min(same, len(session.token_ids) - 1)


def _goes_on(kept: Kept, session: Wanted) -> bool:
    """Whether little of `kept` is lost to its owner, the same buyer, if `session` overwrites it."""
    same = _common(kept.token_ids, session.token_ids)
    return kept.scope == session.scope and 4 * same >= 3 * len(kept.token_ids)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
