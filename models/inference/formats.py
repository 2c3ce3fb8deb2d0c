"""What an answer may be asked to look like: a choice, a JSON schema, a regex or a grammar.

The daemon loads this: standard library and msgspec only. What is told here is told at once and in
microseconds; `grammar.py` compiles a format, in a worker.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

import msgspec

FORMAT_BYTES_MAX: Final = 16 << 10
"""Of all that a format says: compiling it took at most 130 ms in what was tried."""
CHOICES_MAX: Final = 128
CHOICE_CHARACTERS_MAX: Final = 512

_LITERALS: Final = re.compile(r'//[^\n]*|#[^\n]*|"(?:\\.|[^"\\\n])*"i?|/(?:\\.|[^/\\\n])+/')
"""Comments, strings and regexes of a Lark grammar."""
_REFUSED: Final = (
    (re.compile(r"<"), "special tokens: an answer is held against its text alone"),
    (re.compile(r"\b(max_tokens|stop|temperature)\s*="), "max_tokens, stop and temperature"),
    (re.compile(r"~\s*(?!\s|\d)"), "~ (not): it matches bytes that are no text"),
    (re.compile(r"%(?!ignore\b|import\b)"), "% but for %ignore and %import"),
)
"""Of what is left of a Lark grammar without its literals."""
_NEVER: Final = ("%json", "%regex", "%llguidance")
"""Not even in a literal: what a literal is, another reader may see otherwise."""

Choice = Annotated[str, msgspec.Meta(min_length=1, max_length=CHOICE_CHARACTERS_MAX)]
Source = Annotated[str, msgspec.Meta(max_length=FORMAT_BYTES_MAX)]


class Format(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True,
             omit_defaults=True):  # fmt: skip
    """One of four. The whole answer matches it, from the first byte to the last."""

    choice: Annotated[
        tuple[Choice, ...],
        msgspec.Meta(max_length=CHOICES_MAX, description="The answer is one of these."),
    ] = ()
    schema: Annotated[
        Source | dict[str, Any],
        msgspec.Meta(description="A JSON schema, as an object or as its text."),
    ] = ""
    regex: Annotated[
        Source, msgspec.Meta(description="A regular expression, without look-around.")
    ] = ""
    lark: Annotated[
        Source, msgspec.Meta(description="A grammar in Lark's notation; `start` is its root.")
    ] = ""

    def __post_init__(self) -> None:
        said = [name for name in self.__struct_fields__ if getattr(self, name)]
        if len(said) != 1:
            raise ValueError("a format is one of choice, schema, regex and lark")
        if len(set(self.choice)) != len(self.choice):
            raise ValueError("a choice is said twice")
        text = "".join(self.choice) + self.regex + self.lark
        if len(text.encode()) + len(self.schema_text()) > FORMAT_BYTES_MAX:
            raise ValueError(f"a format has at most {FORMAT_BYTES_MAX:,} bytes")
        if fault := lark_fault(self.lark):
            raise ValueError(f"a grammar may not use {fault}")

    def schema_text(self) -> bytes:
        """The schema as JSON, in the order in which it was said; empty: there is none.

        Raises:
            ValueError: it is no JSON object, or uses what would take a worker's time.
        """
        if not self.schema:
            return b""
        try:
            found = self.schema
            if isinstance(found, str):
                found = msgspec.json.decode(found, type=dict[str, Any])
            _require_light(found)
            return msgspec.json.encode(found)
        except (msgspec.MsgspecError, RecursionError, TypeError) as error:
            raise ValueError(f"the schema is no JSON object: {error}") from None


def lark_fault(source: str) -> str:
    """What of a Lark grammar is not taken here; empty: nothing."""
    for word in _NEVER:
        if word in source:
            return word
    code = _LITERALS.sub(" ", source)
    return next((why for found, why in _REFUSED if found.search(code)), "")


def _require_light(schema: Any) -> None:
    """Raises: ValueError: it counts in a way that takes as many states as the number is large."""
    if isinstance(schema, dict):
        if isinstance(schema.get("multipleOf"), int | float):
            raise ValueError(  # noqa: TRY004 - the type is right, the value is not
                "multipleOf is not taken: a large one takes minutes to prepare"
            )
        for value in schema.values():
            _require_light(value)
    elif isinstance(schema, list):
        for value in schema:
            _require_light(value)
