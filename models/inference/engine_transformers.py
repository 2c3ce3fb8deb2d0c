"""Any causal language model of the transformers library, one session after the other in each step.

The reference for architectures that `engine_torch` does not have: right, not fast. Sessions are not
batched, so that each has a cache of its own and shares nothing; sameness is not promised.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from aivillage.models.inference import (
    catalogue,
    constraint,
    grammar,
    placement,
    safetensors_model,
)
from aivillage.models.inference.placement import HOST, Placement, no_memory, on_host
from aivillage.models.inference.session import Session
from aivillage.models.inference.session_engine import prompt_of, slots_taken
from aivillage.models.inference.template_tokenizer import TemplateTokenizer
from aivillage.models.inference.tokenizer import vocabulary_sha256
from aivillage.models.library import manifest as manifests
from aivillage.models.library.hashing import require_whole
from aivillage.protocols.errors import RequestError
from aivillage.protocols.ports import EngineInfo, SessionFrame

if TYPE_CHECKING:
    from transformers import DynamicCache

ENGINE_VERSION: Final = 1
"""Raise it when a change of ours may change a bit of any answer."""
SLOTS: Final = 8
SLICE_ROWS: Final = 32
"""Prompt tokens of one session in a step: a long prompt does not stall the others."""


class TransformersEngine:
    """Serves one safetensors model. Keeps nothing of a session: sameness is not promised."""

    def __init__(
        self,
        model: catalogue.KnownModel,
        *,
        slots: int = SLOTS,
        threads: int = 1,
        at: Placement = HOST,
    ) -> None:
        """Loads: seconds.

        Raises:
            ConfigError: the weights are not on this machine, or not those that were pulled.
            RequestError: the files are of a kind that is not read here.
        """
        torch.set_num_threads(threads)
        begun = time.monotonic()
        folder = catalogue.weights_path(model)
        require_whole(folder, manifests.read(folder))
        self.tokenizer = TemplateTokenizer(folder, model.end_token_ids)
        self._model: Any = safetensors_model.load(folder, at)
        self._device = at.device
        self._slots = slots
        self._sessions: dict[int, Session] = {}
        self._caches: dict[int, DynamicCache] = {}
        self._info = EngineInfo(
            engine="transformers",
            model=model.name,
            kernel_class=_kernel_class(model, at),
            identical="best effort",
            active_parameters=model.active_parameters,
            context_tokens=model.context_tokens,
            vocabulary=model.vocabulary,
            weights_sha256=model.sha256,
            device=str(at.device),
            vocabulary_sha256=vocabulary_sha256(self.tokenizer, model.vocabulary),
        )
        constraint.make_ready(self.tokenizer, model.vocabulary)
        self.load_seconds = time.monotonic() - begun

    def info(self) -> EngineInfo:
        return self._info

    def add(self, session: int, request: Any, delivered: Sequence[int]) -> None:
        """As `session_engine.SessionEngine.add`."""
        if session in self._sessions:
            raise RequestError(f"session {session} is running already")
        prompt = prompt_of(request, delivered, self._info, self.tokenizer)
        if len(self._sessions) >= self._slots:
            raise slots_taken()
        format_ = constraint.of_format(request.format, self.tokenizer, self._info.vocabulary)
        added = Session(session, 0, request, prompt, self.tokenizer, format_)
        added.replay(delivered)
        self._sessions[session] = added

    def allow(self, session: int, units: int) -> None:
        """Raises the units that the answer may hold in all, delivered ones included."""
        if session in self._sessions:
            self._sessions[session].allow(units)

    def step(self) -> list[SessionFrame]:
        """A token of every session that may have one, or a slice of its prompt."""
        moved = {number for number, session in self._sessions.items() if self._moves(session)}
        frames = [s.report() for n, s in self._sessions.items() if n in moved or s.has_news]
        for number in [n for n, s in self._sessions.items() if s.finished]:
            self.cancel(number)
        return frames

    def cancel(self, session: int) -> None:
        """Frees the slot before the next step; an unknown session is no error."""
        self._sessions.pop(session, None)
        self._caches.pop(session, None)

    def _moves(self, session: Session) -> bool:
        """A GPU that is full fails this session, and neither the engine nor others."""
        try:
            return self._advance(session)
        except torch.OutOfMemoryError as error:
            session.fail(no_memory(error))
            return True

    @torch.inference_mode()
    def _advance(self, session: Session) -> bool:
        span = None if session.finished else session.next_span(SLICE_ROWS)
        if span is None:
            return False
        if session.number not in self._caches:
            from transformers import DynamicCache

            self._caches[session.number] = DynamicCache(config=self._model.config)
        found = self._model(
            input_ids=torch.tensor([span.token_ids], device=self._device),
            cache=self._caches[session.number],
            use_cache=True,
            logits_to_keep=1,
        )
        session.read(len(span.token_ids))
        if session.draws_next:
            session.draw(on_host(found.logits[0, -1]))  # (vocabulary,)
        return True


def _kernel_class(model: catalogue.KnownModel, at: Placement) -> str:
    import transformers

    parts = (
        f"transformers{ENGINE_VERSION}",
        transformers.__version__,
        torch.__version__,
        model.sha256[:16],
        placement.type_name(at),
        placement.hardware(at),
        f"threads{torch.get_num_threads()}",
        grammar.version(),
    )
    return "/".join(parts)
