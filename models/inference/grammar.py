"""A format -> a matcher of llguidance's: for an engine's tokens, or for a whole answer's bytes.

No torch; the library is imported on use, in workers only. Its limits bound what a hostile format
costs: docs/decisions/0014-structured.md has what was measured.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from aivillage.models.inference.formats import Format
from aivillage.protocols.errors import RefusedError, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LIBRARY: Final = "llguidance"
NEXT_STEP: Final = "pip install 'aivillage[models]'"
_END_OF_BYTES: Final = 256
_LIMITS: Final = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 50_000,
}
"""Of an engine: no step of one session may hold up the others for long."""
_CHECK_FACTOR: Final = 20
"""A check reads bytes, not tokens, and may not stumble where the engine did not."""
_ONE_LINE: Final = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "lenient": False,
    "coerce_one_of": False,
}
"""JSON as Python writes it: a small model that may draw whitespace draws nothing else."""


def is_installed() -> bool:
    """Whether formats can be compiled on this machine; nothing is imported."""
    return importlib.util.find_spec(LIBRARY) is not None


def require_installed() -> None:
    """Raises: RefusedError: NOT_OFFERED, no format can be compiled on this machine."""
    if not is_installed():
        raise RefusedError(
            f"formats need {LIBRARY}, which is not installed here",
            code="NOT_OFFERED",
            next_step=NEXT_STEP,
        )


@functools.cache
def version() -> str:
    """What draws under a format depend on, as a part of a kernel class."""
    try:
        return LIBRARY + importlib.metadata.version(LIBRARY)
    except importlib.metadata.PackageNotFoundError:
        return "unformatted"


def source_of(wanted: Format) -> str:
    """The grammar in the library's own notation.

    Raises:
        RefusedError: NOT_OFFERED, the library is not installed.
    """
    require_installed()
    from llguidance import LLMatcher

    if wanted.choice:
        words = " | ".join(json.dumps(word) for word in wanted.choice)
        return LLMatcher.grammar_from_lark(f"start: WORD\nWORD: {words}")
    if wanted.schema:
        options: Any = _ONE_LINE
        return LLMatcher.grammar_from_json_schema(wanted.schema_text().decode(), overrides=options)
    if wanted.regex:
        return LLMatcher.grammar_from_regex(wanted.regex)
    return LLMatcher.grammar_from_lark(wanted.lark)


def matcher(wanted: Format, tokens: LLTokenizer, *, factor: int = 1) -> LLMatcher:
    """A matcher at the beginning of an answer; `factor` times an engine's limits.

    Raises:
        RequestError: the format is wrong, matches nothing, or is too large.
        RefusedError: NOT_OFFERED, the library is not installed.
    """
    source = source_of(wanted)
    from llguidance import LLMatcher, LLParserLimits

    limits: dict[str, Any] = {name: limit * factor for name, limit in _LIMITS.items()}
    limits |= {"verbose_errors": False}
    found = LLMatcher(tokens, source, log_level=0, limits=LLParserLimits(**limits))
    found.compute_logit_bias()  # that nothing matches shows here
    if found.is_error():
        raise RequestError(
            f"the format cannot be taken: {_first_lines(found.get_error())}",
            next_step="docs/structured.md says what formats may use",
        )
    return found


def require_compiles(wanted: Format) -> None:
    """Raises: RequestError, RefusedError: as `matcher`, for any model."""
    matcher(wanted, _bytes())


def fault(wanted: Format, answer: bytes, *, whole: bool) -> str:
    """Why `answer` does not match, or cannot be the beginning of what does; empty: it does.

    Where the library's limits end the look, nothing is said against the answer.

    Raises:
        RequestError, RefusedError: as `matcher`.
    """
    if wanted.choice:
        texts = [word.encode() for word in wanted.choice]
        fits = answer in texts if whole else any(text.startswith(answer) for text in texts)
        return "" if fits else "the answer is none of the choices"
    look = matcher(wanted, _bytes(), factor=_CHECK_FACTOR)
    taken = look.try_consume_tokens(list(answer))
    if look.is_error():
        return ""
    if taken < len(answer):
        return f"the answer leaves its format at byte {taken}"
    return "the answer ends before its format does" if whole and not look.is_accepting() else ""


def tokenizer(
    words: Sequence[bytes], end_token_ids: Sequence[int], encode: Callable[[str], list[int]]
) -> LLTokenizer:
    """`words[token]` is what a token says; empty: it is a mark. A tenth of a second, or a few."""
    from llguidance import LLTokenizer, TokenizerWrapper

    marks = [token for token, word in enumerate(words) if not word]
    named = [word or b"<|%d|>" % token for token, word in enumerate(words)]
    made = TokenizerWrapper(_Words(named, marks, end_token_ids[0], encode))
    return LLTokenizer(made, eos_token=list(end_token_ids))


class _Words(msgspec.Struct):
    """A tokenizer as the library wants it."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    encode: Callable[[str], list[int]]
    bos_token_id: int | None = None

    def __call__(self, text: str | bytes) -> list[int]:
        return self.encode(text if isinstance(text, str) else text.decode(errors="replace"))


@functools.cache
def _bytes() -> LLTokenizer:
    """One token a byte: an answer's text is read without its model's tokenizer."""
    words = [bytes((byte,)) for byte in range(_END_OF_BYTES)]
    return tokenizer([*words, b""], [_END_OF_BYTES], lambda text: list(text.encode()))


def _first_lines(text: str) -> str:
    """Of the library's message; it may quote the whole grammar below."""
    if text.startswith("NoExtension"):
        return "nothing matches it"
    return " ".join(text.partition("<non-verbose/>")[0].split())[:300]
