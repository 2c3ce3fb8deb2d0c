"""Text <-> token ids of a GPT-2 byte-level BPE, from the tables inside a GGUF file. No torch.

Roles are marked by ids that no text can spell: `<|im_end|>` inside a message stays plain text, so a
message cannot end itself.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from aivillage.models.inference import catalogue
from aivillage.models.inference.generate import ChatMessage
from aivillage.models.inference.gguf_file import GgufFile
from aivillage.protocols.errors import RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SYSTEM_DEFAULT: Final = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM_DEFAULT + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The one template spoken here; a file with another one is refused rather than misread."""
_PLAIN: Final = 1
"""The token type of ordinary text; all others are marks without text."""


class Prompt(msgspec.Struct, frozen=True):
    """`content_bytes[i]`: bytes of message contents read once token `i` has been read."""

    token_ids: tuple[int, ...]
    content_bytes: tuple[int, ...]


class Speaker(Protocol):
    """What an engine needs of a tokenizer, whatever it was read from."""

    end_token_ids: frozenset[int]

    def token_bytes(self, token: int) -> bytes:
        """What `token` says, as bytes; nothing for a mark."""
        ...

    def encode(self, text: str) -> list[int]:
        """Plain text as ids; marks inside it are text too."""
        ...

    def prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        """The conversation as the model was taught to read it, up to where it answers."""
        ...


class ChatTokenizer:
    """The tokenizer of one GGUF file."""

    def __init__(self, file: GgufFile) -> None:
        """Raises: RequestError: the file has a tokenizer or a chat template of another kind."""
        kind, split = (file.field(f"tokenizer.ggml.{name}", str) for name in ("model", "pre"))
        if (kind, split) != ("gpt2", "smollm"):
            raise RequestError(f"a tokenizer of kind {kind}/{split} is not read here")
        if file.field("tokenizer.chat_template", str) != CHAT_TEMPLATE:
            raise RequestError("the model's chat template is not one that is spoken here")
        self._words: list[str] = file.field("tokenizer.ggml.tokens", list)
        self._merges: list[str] = file.field("tokenizer.ggml.merges", list)
        self._ids = {word: index for index, word in enumerate(self._words)}
        types = file.field("tokenizer.ggml.token_type", list)
        if len(types) != len(self._words) or len(self._ids) != len(self._words):
            raise RequestError("the tokenizer's tables do not fit together")
        letters = byte_of_letter()
        self._bytes = [
            bytes(letters[letter] for letter in word) if kind == _PLAIN else b""
            for word, kind in zip(self._words, types, strict=True)
        ]
        self.end_token_id: int = file.field("tokenizer.ggml.eos_token_id", int)
        self.end_token_ids = frozenset((self.end_token_id,))
        self._start, self._end = self._mark("<|im_start|>"), self._mark("<|im_end|>")

    def token_bytes(self, token: int) -> bytes:
        """What `token` says, as bytes; nothing for a mark."""
        return self._bytes[token]

    def encode(self, text: str) -> list[int]:
        """Plain text as ids; marks inside it are text too."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        """The conversation as the model was taught to read it, up to where it answers."""
        ids: list[int] = []
        counts: list[int] = []
        if messages[0].role != "system":
            self._append(ids, counts, "system", SYSTEM_DEFAULT, counted=False)
        for message in messages:
            self._append(ids, counts, message.role, message.content, counted=True)
        opening = [self._start, *self.encode("assistant\n")]
        return Prompt(
            token_ids=(*ids, *opening),
            content_bytes=tuple(itertools.accumulate([*counts, *[0] * len(opening)])),
        )

    def _append(
        self, ids: list[int], counts: list[int], role: str, content: str, *, counted: bool
    ) -> None:
        """One message; `counts` says how many bytes of content each token read."""
        header_bytes = len(role) + 1
        inner = self.encode(f"{role}\n{content}")
        ends = itertools.accumulate(len(self._bytes[token]) for token in inner)
        read = [max(0, end - header_bytes) if counted else 0 for end in ends]
        new = [read_now - before for before, read_now in itertools.pairwise([0, *read])]
        tail = [self._end, *self.encode("\n")]
        ids += [self._start, *inner, *tail]
        counts += [0, *new, *[0] * len(tail)]

    def _mark(self, word: str) -> int:
        if word not in self._ids:
            raise RequestError(f"the tokenizer has no {word}")
        return self._ids[word]

    @functools.cached_property
    def _bpe(self) -> Tokenizer:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        pairs = [(left, right) for left, _, right in (m.partition(" ") for m in self._merges)]
        try:
            bpe = Tokenizer(models.BPE(vocab=self._ids, merges=pairs))
        except Exception as error:  # the library raises bare Exception for a bad table
            raise RequestError(f"the tokenizer's tables do not fit together: {error}") from None
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        return bpe


def byte_of_letter() -> dict[str, int]:
    """The alphabet of GPT-2's byte-level BPE: each of the 256 bytes has one visible letter.

    Source: Radford et al. 2019, encoder.py, `bytes_to_unicode`.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def vocabulary_sha256(speaker: Speaker, count: int) -> str:
    """Of what each of `count` token ids says, in turn, and of those that end an answer.

    Two models that share it guess for each other: what an id is to one, it is to the other.
    """
    digest = hashlib.sha256(repr((count, sorted(speaker.end_token_ids))).encode())
    for token in range(count):
        said = speaker.token_bytes(token)
        digest.update(len(said).to_bytes(4, "big") + said)
    return digest.hexdigest()


def of_model(model: catalogue.KnownModel) -> Speaker:
    """The tokenizer of a model that is here, read once per process.

    Raises:
        AivillageError: it is not here, or its tokenizer is of a kind that is not read.
    """
    return _read(model.format, str(catalogue.weights_path(model)), model.end_token_ids)


@functools.lru_cache(maxsize=8)
def _read(kind: str, path: str, end_token_ids: frozenset[int]) -> Speaker:
    if kind == "gguf":
        return ChatTokenizer(GgufFile(Path(path)))
    from aivillage.models.inference.template_tokenizer import TemplateTokenizer

    return TemplateTokenizer(Path(path), end_token_ids)
