"""The answer of a model that is split over stages, as its driver keeps it. No torch.

A round is what the first stage reads at once: the prompt, or one token and a few guesses of what
follows it. The last stage draws a token for each; a guess that was right saves a whole round, and
a wrong one changes nothing, since a draw depends on seed and position alone.

Source: prompt lookup as in Saxena, "Prompt Lookup Decoding" (2023); exactness as in Leviathan et
al., arXiv 2211.17192, for draws that are a function of their position.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Final

import msgspec

from aivillage.models.inference import catalogue, tokenizer
from aivillage.models.inference.generate import GenerateRequest, conversation
from aivillage.models.inference.logprobs import require_size, token_size
from aivillage.models.inference.stages import INPUT_ROWS_MAX, StageInput
from aivillage.models.inference.text_stream import TextStream
from aivillage.models.inference.tokenizer import Speaker
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.ports import EngineInfo, SessionFrame
from aivillage.protocols.types import U32

DRAFT_TOKENS_MAX: Final = 15
"""With the token before them 16 rows, which cost hardly more than 4."""
DRAFT_TOKENS_MIN: Final = 3
"""4 rows are computed where there is one."""
NGRAM_SIZES: Final = (3, 2)
"""The longer a repeated run of tokens, the likelier what followed it follows again."""


class PromptLookup:
    """Guesses what follows from what followed the same few tokens before."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}
        """Where what followed a run of tokens begins; the latest counts."""

    def append(self, token: int) -> None:
        end = len(self._ids)
        for size in NGRAM_SIZES:
            if end >= size:
                self._follows[tuple(self._ids[end - size : end])] = end
        self._ids.append(token)

    def guess(self, count: int) -> list[int]:
        """Up to `count` tokens; none where the last ones are new together."""
        for size in NGRAM_SIZES:
            at = self._follows.get(tuple(self._ids[-size:]))
            if at is not None and len(self._ids) >= size:
                guessed = self._ids[at : at + count]
                while len(guessed) < count:  # a repetition goes on in what is guessed itself
                    guessed.append(guessed[at - len(self._ids)])
                return guessed
        return []


class Eagerness:
    """How many guesses a round has of one that guesses: more after it was right, few after not."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.count = min(DRAFT_TOKENS_MIN, most)

    def learn(self, made: int, right: int) -> None:
        if made:
            more = 2 * self.count + 1 if right == made else DRAFT_TOKENS_MIN
            self.count = min(more, self._most)


class Rounds:
    """What is read next, round by round, as token ids alone say it: whoever feeds knows it too."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        end_token_ids: Collection[int],
        drafts_max: int = DRAFT_TOKENS_MAX,
    ) -> None:
        self.token_ids: list[int] = []
        self.count = 0
        self.ended = False
        """Whether no token follows. A stop string may end the answer before: it is text."""
        self._max_tokens = max_tokens
        self._end_token_ids = end_token_ids
        self._unread = list(prompt_ids)
        self._position = 0
        self._guesses: list[int] = []
        self._of_lookup, self._of_others = Eagerness(drafts_max), Eagerness(drafts_max)
        self._is_lookup = True
        """Whose guesses are in the round."""
        self._lookup = PromptLookup()
        for token in self._unread:
            self._lookup.append(token)

    @property
    def tokens_left(self) -> int:
        """How many the answer may still get."""
        return self._max_tokens - len(self.token_ids)

    @property
    def places(self) -> int:
        """Guesses of somebody else's that the next round takes: none beside those of lookup."""
        return 0 if self._looked_up() or not self._decodes else self._room(self._of_others)

    def inputs(self, guesses: Sequence[int] = ()) -> tuple[StageInput, ...]:
        """What the first stage reads in the next round, in slices; the last one draws.

        `guesses`: somebody else's, for where lookup has none; right or wrong, they change no draw.
        Those from an end on are left out: the token before it says as much.
        """
        goes_on = itertools.takewhile(lambda token: token not in self._end_token_ids, guesses)
        looked_up = self._looked_up()
        self._is_lookup = bool(looked_up)
        self._guesses = looked_up or list(goes_on)[: self.places]
        ids = [*self._unread, *self._guesses]
        slices = [ids[at : at + INPUT_ROWS_MAX] for at in range(0, len(ids), INPUT_ROWS_MAX)]
        made = tuple(
            StageInput(self._position + n * INPUT_ROWS_MAX, tuple(part))
            for n, part in enumerate(slices)
        )
        draws = 1 + len(self._guesses)
        return (*made[:-1], StageInput(made[-1].position, made[-1].token_ids, draws=draws))

    def take(self, drawn: Sequence[int]) -> tuple[int, ...]:
        """What a round gave: every draw up to the first one that a guess had not foreseen.

        Raises:
            RequestError: these are not the draws of the round.
        """
        if len(drawn) != 1 + len(self._guesses):
            raise RequestError(f"{len(drawn)} draws where {1 + len(self._guesses)} were due")
        self.count += 1
        self._append(drawn[0])
        right = 0
        for guess, token in zip(self._guesses, drawn[1:], strict=True):
            if self.ended or self.token_ids[-1] != guess:
                break  # what was read of the guess is no part of the answer
            right += 1
            self._append(token)
        self._position += len(self._unread) + right
        self._unread = [self.token_ids[-1]]
        eager = self._of_lookup if self._is_lookup else self._of_others
        eager.learn(len(self._guesses), right)
        return tuple(self.token_ids[-1 - right :])

    @property
    def _decodes(self) -> bool:
        """Not while the prompt is read; a prompt of one token is as good as decoded."""
        return len(self._unread) == 1

    def _room(self, eager: Eagerness) -> int:
        return max(0, min(eager.count, self.tokens_left - 1))

    def _looked_up(self) -> list[int]:
        return self._lookup.guess(self._room(self._of_lookup)) if self._decodes else []

    def _append(self, token: int) -> None:
        self.token_ids.append(token)
        self._lookup.append(token)
        self.ended = token in self._end_token_ids or len(self.token_ids) == self._max_tokens


class SplitAnswer:
    """One answer in the making: `inputs` of a round go through the stages, `take` its draws."""

    def __init__(
        self, request: GenerateRequest, tokens: Speaker, *, drafts_max: int = DRAFT_TOKENS_MAX
    ) -> None:
        """Raises: RequestError: TOO_LARGE, it leaves the context."""
        context_tokens = catalogue.known(request.model).context_tokens
        self.prompt = tokens.prompt(conversation(request))
        if len(self.prompt.token_ids) + request.max_tokens > context_tokens:
            raise RequestError(
                f"the prompt has {len(self.prompt.token_ids)} tokens; with {request.max_tokens} "
                f"more it leaves the context of {context_tokens}",
                code="TOO_LARGE",
                next_step="shorten the prompt or ask for fewer tokens",
            )
        self.finished = ""
        self.token_ids: list[int] = []
        self._request = request
        self._end_token_ids = tokens.end_token_ids
        self._stream = TextStream(tokens.token_bytes, request.stop)
        self._rounds = Rounds(
            self.prompt.token_ids,
            max_tokens=request.max_tokens,
            end_token_ids=tokens.end_token_ids,
            drafts_max=drafts_max,
        )
        self.inputs = self._rounds.inputs

    @property
    def rounds(self) -> int:
        return self._rounds.count

    def begun(self) -> Begun:
        """What `Rounds` elsewhere need to go on alone."""
        return Begun(tuple(self.prompt.token_ids), tuple(sorted(self._end_token_ids)))

    def take(self, drawn: Sequence[int], logprobs: bytes = b"") -> SessionFrame:
        """What a round gave, in words.

        Raises:
            RequestError: these are not the draws of the round.
        """
        require_size(logprobs, len(drawn), self._request.logprobs)
        new = self._rounds.take(drawn)
        return self.say(new, logprobs[: len(new) * token_size(self._request.logprobs)])

    def say(self, token_ids: Sequence[int], logprobs: bytes = b"") -> SessionFrame:
        """The next tokens of the answer as text, up to where it ends.

        Raises:
            RequestError: there are none.
        """
        if not token_ids:
            raise RequestError("a round gives a token")
        require_size(logprobs, len(token_ids), self._request.logprobs)
        first, text = len(self.token_ids), ""
        for token in token_ids:
            text += self._append(token)
            if self.finished:
                text += self._stream.flush()
                break
        new = tuple(self.token_ids[first:])
        said = logprobs[: len(new) * token_size(self._request.logprobs)]
        read_bytes = self.prompt.content_bytes[-1]
        return SessionFrame(0, new, text, read_bytes, self.finished, logprobs=said)

    def _append(self, token: int) -> str:
        self.token_ids.append(token)
        said = self._stream.push(token)
        if token in self._end_token_ids:
            self.finished = "eos"
        elif self._stream.stopped:
            self.finished = "stop"
        elif len(self.token_ids) == self._request.max_tokens:
            self.finished = "length"
        return said


class Begun(msgspec.Struct, frozen=True, array_like=True):
    """What a driver says first: the prompt's tokens, and those that end an answer."""

    prompt_ids: tuple[U32, ...]
    end_token_ids: tuple[U32, ...]


class Draws(msgspec.Struct, frozen=True, array_like=True):
    token_ids: Annotated[tuple[U32, ...], msgspec.Meta(max_length=INPUT_ROWS_MAX)]
    logprobs: bytes = b""


class SplitDriver:
    """An engine without a model: sessions that turn a prompt into tokens, and tokens into words."""

    def __init__(self, model: catalogue.KnownModel, *, slots: int = 1) -> None:
        """Raises: ConfigError: the model's tokenizer is not on this machine."""
        self._slots = slots
        self._tokens = tokenizer.of_model(model)
        self._vocabulary_sha256 = tokenizer.vocabulary_sha256(self._tokens, model.vocabulary)
        self._model = model
        self._answers: dict[int, SplitAnswer] = {}
        self._frames: list[SessionFrame] = []
        self.load_seconds = 0.0

    def info(self) -> EngineInfo:
        return EngineInfo(
            engine="split",
            model=self._model.name,
            kernel_class="",
            identical="best effort",
            active_parameters=0,
            context_tokens=self._model.context_tokens,
            vocabulary=self._model.vocabulary,
            weights_sha256="",
            vocabulary_sha256=self._vocabulary_sha256,
        )

    def add(self, session: int, request: Any, delivered: Sequence[int]) -> None:
        """Raises: RequestError: it does not fit the model, or goes on from something."""
        if not isinstance(request, GenerateRequest) or request.model != self._model.name:
            raise RequestError(f"this driver splits answers of {self._model.name}")
        if session in self._answers or delivered:
            raise RequestError("a split answer begins anew, and each in a session of its own")
        if len(self._answers) >= self._slots:
            raise RefusedError("every slot of the driver is taken", next_step="try again")
        answer = SplitAnswer(request, self._tokens)
        self._answers[session] = answer
        self._frames.append(SessionFrame(session, (), "", 0, body=pack(answer.begun())))

    def allow(self, session: int, units: int) -> None:
        """Nothing is computed here that somebody pays."""

    def feed(self, session: int, body: bytes) -> None:
        """Takes the `Draws` of a round that count. An unknown session is no error."""
        answer = self._answers.get(session)
        if answer is None or answer.finished:
            return
        try:
            draws = unpack(Draws, body)
            frame = answer.say(draws.token_ids, draws.logprobs)
        except RequestError as error:
            frame = SessionFrame(session, (), "", 0, "error", error.message)
            self.cancel(session)
        self._frames.append(msgspec.structs.replace(frame, session=session))

    def step(self) -> list[SessionFrame]:
        frames, self._frames = self._frames, []
        return frames

    def cancel(self, session: int) -> None:
        self._answers.pop(session, None)
