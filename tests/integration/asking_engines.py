"""Engines asked without a node: whole answers, alone and together. Needs the extra `models`."""

from __future__ import annotations

import functools

from aivillage.models import gpu
from aivillage.models.inference import catalogue, engine_choice, logprobs
from aivillage.models.inference.engine_torch import TorchEngine
from aivillage.models.inference.generate import Piece, joined, piece_of
from aivillage.models.inference.kept import NOTHING

PLENTY = 10**6


@functools.cache
def torch_engine() -> TorchEngine:
    """This process's reference engine of the packaged model, loaded once for all tests."""
    return TorchEngine(catalogue.known(catalogue.DEFAULT))


@functools.cache
def packaged(name, device="cpu"):
    """This process's engine `name` of the packaged model: another one than `torch_engine`."""
    model, where = catalogue.known(catalogue.DEFAULT), gpu.Device(device)
    return engine_choice.engine_of(model, slots=8, engine=name, device=where)


def forget(engine):
    """What earlier sessions read is read again by the next ones."""
    free = engine._slots._free
    free.update(dict.fromkeys(free, NOTHING))


def together(engine, requests, delivered=()):
    """Each request's (ids, text, finished), all run in one batch, from its first token on."""
    forget(engine)
    delivered = delivered or [()] * len(requests)
    ids, text, ends = {}, {}, {}
    for number, (request, before) in enumerate(zip(requests, delivered, strict=True)):
        engine.add(number, request, before)
        engine.allow(number, PLENTY)
        ids[number], text[number] = list(before), ""
    while frames := engine.step():
        for frame in frames:
            ids[frame.session] += frame.token_ids
            text[frame.session] += frame.text
            if frame.finished:
                ends[frame.session] = frame.finished
    return [(ids[n], text[n], ends[n]) for n in range(len(requests))]


def results(engine, requests, delivered=()):
    """Each request's whole `GenerateResult`, all run in one batch, after the pieces `delivered`."""
    pieces = {n: list(before) for n, before in enumerate(delivered or [()] * len(requests))}
    found = {}
    for number, request in enumerate(requests):
        ids = [token for piece in pieces[number] for token in piece.token_ids]
        engine.add(number, request, ids)
        engine.allow(number, PLENTY)
    while frames := engine.step():
        for frame in frames:
            assert not frame.error, frame.error
            pieces[frame.session].append(piece_of(frame))
            if frame.finished:
                asked = requests[frame.session]
                found[frame.session] = joined(asked, pieces[frame.session], frame.finished)
    return [found[number] for number in range(len(requests))]


def cut(result, count):
    """The first `count` tokens of `result` as a buyer hands them to the next seller."""
    said = logprobs.packed_all(result.logprobs[:count])
    return (Piece(result.token_ids[:count], "", result.prompt_bytes, logprobs=said),)


def alone(engine, request, delivered=()):
    return together(engine, [request], [delivered])[0]
