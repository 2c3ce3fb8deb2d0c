"""Stages of the packaged model in one process, and answers that go through them round by round."""

from __future__ import annotations

import itertools

import msgspec

from aivillage.models.inference import catalogue, tokenizer
from aivillage.models.inference.engine_stage import StageEngine
from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.inference.split import DRAFT_TOKENS_MAX, SplitAnswer
from aivillage.models.inference.stages import StageInput, StageOutput, StageRequest
from aivillage.protocols.codec import pack, unpack

MODEL = catalogue.known(catalogue.DEFAULT)


def cuts(parts: int) -> list[tuple[int, int]]:
    """The model's layers in so many parts, as even as can be."""
    edges = [MODEL.layers * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(edges))


class Chain:
    """Stages one behind the other. `history` is what each was fed, for a stand-in."""

    def __init__(self, parts: int) -> None:
        self.engines = [StageEngine(MODEL, *cut) for cut in cuts(parts)]

    def open(self, session: int, request: GenerateRequest, answer: SplitAnswer) -> None:
        for engine, (first, last) in zip(self.engines, cuts(len(self.engines)), strict=True):
            wanted = StageRequest(
                first=first,
                last=last,
                prompt_tokens=len(answer.prompt.token_ids),
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
            )
            if engine is self.engines[-1]:
                wanted = msgspec.structs.replace(
                    wanted, format=request.format, logprobs=request.logprobs
                )
            engine.add(session, wanted, ())

    def pass_through(self, fed: dict[int, StageInput]) -> dict[int, StageOutput]:
        """One input for each session, all in one batch; gives what was drawn."""
        last = self.engines[-1]
        for engine in self.engines:
            for session, body in fed.items():
                draws = body.draws if engine is last else 0
                engine.feed(session, pack(StageInput(body.position, body.token_ids,
                                                     body.states, draws)))  # fmt: skip
            outputs: dict[int, StageOutput] = {}
            while len(outputs) < len(fed):
                for frame in engine.step():
                    assert not frame.error, frame.error
                    outputs[frame.session] = unpack(StageOutput, frame.body)
            if engine is last:
                return outputs
            fed = {
                session: StageInput(body.position, (), outputs[session].states, body.draws)
                for session, body in fed.items()
            }
        raise AssertionError("a chain has a last stage")

    def together(
        self, requests: list[GenerateRequest], drafts_max: int = DRAFT_TOKENS_MAX
    ) -> list[tuple[list[int], str, str, int, bytes]]:
        """(ids, text, why it ended, rounds, log-probabilities) of every request, all in flight."""
        tokens = tokenizer.of_model(MODEL)
        answers = [SplitAnswer(r, tokens, drafts_max=drafts_max) for r in requests]
        texts, said = [""] * len(answers), [b""] * len(answers)
        for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            self.open(number, request, answer)
        waiting = {number: list(answer.inputs()) for number, answer in enumerate(answers)}
        while waiting:
            drawn = self.pass_through({number: ins.pop(0) for number, ins in waiting.items()})
            for number in [number for number, ins in waiting.items() if not ins]:
                out = drawn[number]
                frame = answers[number].take(out.token_ids, out.logprobs)
                texts[number] += frame.text
                said[number] += frame.logprobs
                del waiting[number]
                if not answers[number].finished:
                    waiting[number] = list(answers[number].inputs())
        for number in range(len(answers)):
            for engine in self.engines:
                engine.cancel(number)
        return [
            (one.token_ids, text, one.finished, one.rounds, logprobs)
            for one, text, logprobs in zip(answers, texts, said, strict=True)
        ]
