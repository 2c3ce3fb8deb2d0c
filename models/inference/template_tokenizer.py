"""The tokenizer of a safetensors model: tokenizer.json, and the chat template that came with it.

The template is a program of a stranger's: it is rendered in a sandbox, in a fenced worker, and sees
a stand-in for each message, never its text. So no message can spell a mark, and which tokens read
which bytes of a message is known: that is what a prompt is paid by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from aivillage.models.inference.generate import ChatMessage
from aivillage.models.inference.tokenizer import Prompt, byte_of_letter
from aivillage.protocols.errors import RequestError

CONFIG_BYTES_MAX: Final = 4 << 20
TOKENIZER_BYTES_MAX: Final = 64 << 20
"""A vocabulary of 256,000 takes half of it."""
TEMPLATE_CHARACTERS_MAX: Final = 64 << 10
RENDERED_CHARACTERS_MAX: Final = 1 << 20
"""Of a template around at most 256 stand-ins."""
_BYTE_WORD: Final = re.compile(r"<0x([0-9A-F]{2})>")


class _Run(msgspec.Struct):
    """Text that is encoded in one piece; `counted` are the parts of it that are messages."""

    text: str = ""
    counted: list[tuple[int, int]] = msgspec.field(default_factory=list)
    """(first character, the one after the last)."""


class TemplateTokenizer:
    """Made from a folder; needs jinja2 and tokenizers, not torch."""

    def __init__(self, folder: Path, end_token_ids: frozenset[int]) -> None:
        """Raises: RequestError: a file is missing, too large, or of a kind that is not read."""
        from tokenizers import Tokenizer

        text = read_text(folder / "tokenizer.json", TOKENIZER_BYTES_MAX)
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for a bad file
            raise RequestError(f"tokenizer.json cannot be read: {str(error)[:300]}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # in plain text a mark is text
        self.end_token_ids = end_token_ids
        added = self._tokenizer.get_added_tokens_decoder()
        self._marks = {token.content: number for number, token in added.items() if token.special}
        self._says = _speaker(json.loads(text))
        self._settings = read_json(folder / "tokenizer_config.json")
        self._template = _template(folder, self._settings)
        self.vocabulary: int = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def token_bytes(self, token: int) -> bytes:
        """What `token` says, as bytes; nothing for a mark, or an id beside the vocabulary."""
        word = self._tokenizer.id_to_token(token)
        return b"" if word is None or word in self._marks else self._says(word)

    def encode(self, text: str) -> list[int]:
        """Plain text as ids; marks inside it are text too."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        """The conversation as the template has it, up to where the model answers.

        Raises:
            RequestError: the template refuses it, or leaves out a message.
        """
        ids: list[int] = []
        read: list[int] = []
        for piece in self._pieces(messages):
            if isinstance(piece, int):
                ids.append(piece)
                read.append(read[-1] if read else 0)
            else:
                self._append(piece, ids, read)
        if not ids:
            raise RequestError("the model's chat template says nothing")
        read[-1] = max(read[-1], sum(len(message.content.encode()) for message in messages))
        return Prompt(token_ids=tuple(ids), content_bytes=tuple(read))

    def _append(self, run: _Run, ids: list[int], read: list[int]) -> None:
        before = read[-1] if read else 0
        encoded = self._tokenizer.encode(run.text, add_special_tokens=False)
        ends = [end for _, end in encoded.offsets]
        for token, end in zip(encoded.ids, ends, strict=True):
            ids.append(token)
            read.append(before + _content_bytes(run, end))
        if encoded.ids:
            read[-1] = before + _content_bytes(run, len(run.text))

    def _pieces(self, messages: Sequence[ChatMessage]) -> Iterator[int | _Run]:
        """Marks as ids, and between them text in one piece: the template's and the messages'."""
        stand_ins = {f"\ue000{number}\ue001": m.content for number, m in enumerate(messages)}
        text = self._rendered(messages, list(stand_ins))
        words = sorted((*self._marks, *stand_ins), key=len, reverse=True)
        run = _Run()
        seen: list[str] = []
        for part in re.split(f"({'|'.join(map(re.escape, words))})", text):
            if part in self._marks:
                if run.text:
                    yield run
                    run = _Run()
                yield self._marks[part]
            elif part in stand_ins:
                seen.append(part)
                begin = len(run.text)
                run.text += stand_ins[part]
                run.counted.append((begin, len(run.text)))
            else:
                run.text += part
        if run.text:
            yield run
        if seen != list(stand_ins):
            raise RequestError("the model's chat template does not take such a conversation")

    def _rendered(self, messages: Sequence[ChatMessage], stand_ins: Sequence[str]) -> str:
        spoken = [
            {"role": message.role, "content": word}
            for message, word in zip(messages, stand_ins, strict=True)
        ]
        marks = {
            name: _word(self._settings.get(name))
            for name in ("bos_token", "eos_token", "unk_token")
        }
        try:
            text = (
                _environment()
                .from_string(self._template)
                .render(
                    messages=spoken, add_generation_prompt=True, tools=None, documents=None, **marks
                )
            )
        except Exception as error:  # whatever a stranger's template may raise
            raise RequestError(
                f"the model's chat template refuses it: {str(error)[:300]}"
            ) from None
        if len(text) > RENDERED_CHARACTERS_MAX:
            raise RequestError("the model's chat template says too much", code="TOO_LARGE")
        return str(text)


def _content_bytes(run: _Run, end: int) -> int:
    """UTF-8 bytes of messages in the first `end` characters."""
    return sum(
        len(run.text[begin : min(last, end)].encode()) for begin, last in run.counted if begin < end
    )


def _environment() -> Any:
    """As the transformers library has it. Source: its utils/chat_template_utils.py."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    found.globals["raise_exception"] = refuse
    found.globals["strftime_now"] = lambda _format: ""  # the same request, the same prompt
    return found


def _template(folder: Path, settings: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    found = read_text(path, CONFIG_BYTES_MAX) if path.exists() else settings.get("chat_template")
    if not isinstance(found, str) or not found:
        raise RequestError(
            "the model has no chat template: it was not taught to answer",
            next_step="pull a model that was, often called Instruct or Chat",
        )
    if len(found) > TEMPLATE_CHARACTERS_MAX:
        raise RequestError(
            f"a chat template has at most {TEMPLATE_CHARACTERS_MAX:,} characters", code="TOO_LARGE"
        )
    return found


def _speaker(table: dict[str, Any]) -> Any:
    """`word -> bytes`, by what the file says that its decoder is."""
    kinds = set(re.findall(r'"type": "(\w+)"', json.dumps(table.get("decoder"))))
    if "ByteLevel" in kinds:
        letters = byte_of_letter()
        return lambda word: b"".join(
            bytes((letters[c],)) if c in letters else c.encode() for c in word
        )
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return _said_by_piece
    raise RequestError("tokenizer.json has a decoder of a kind that is not read here")


def _said_by_piece(word: str) -> bytes:
    if found := _BYTE_WORD.fullmatch(word):
        return bytes((int(found.group(1), 16),))
    return word.replace("\u2581", " ").encode()


def _word(value: Any) -> str:
    """A mark, as old and new files write it."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""


def read_text(path: Path, bytes_max: int) -> str:
    """Raises: RequestError: it is missing, too large, or no text."""
    try:
        if path.stat().st_size > bytes_max:
            raise RequestError(f"{path.name} has more than {bytes_max:,} bytes", code="TOO_LARGE")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path.name} cannot be read: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Raises: RequestError: it is missing, too large, or no table."""
    try:
        found = json.loads(read_text(path, CONFIG_BYTES_MAX))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path.name} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise RequestError(f"{path.name} is no table")
    return found
