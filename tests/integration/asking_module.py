"""A third-party module that has work done by others. Run in workers by test_sub_jobs.py."""

import msgspec

from aivillage.models.mesh.noop import NoopRequest
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.ports import ResultEvent, Verdict


class AskRequest(msgspec.Struct, kw_only=True):
    operation: str = "mesh.noop"
    times: int = 1
    budget: int = 50
    sleep_seconds: float = 0.0
    depth: int = 0


class AskResult(msgspec.Struct, kw_only=True):
    said: list[str] = []


class Ask:
    name = "test.ask"
    title = "Asks the mesh"
    positional = "operation"
    Request = AskRequest
    Result = AskResult

    def prices_micro_credits(self):
        return {"calls": 1000}

    def estimate(self, request, machine):
        return {"calls": 1}, 0.1

    def meter(self, request, result):
        return {"calls": 1}

    def check(self, request, result):
        return Verdict(ok=True)

    def run(self, request, context):
        said = []
        for number in range(request.times):
            try:
                body = context.call(request.operation, self.inner(request, number), request.budget)
                answer = msgspec.msgpack.decode(body)
                said += answer["said"] if request.depth else [answer["note"]]
            except AivillageError as error:
                said.append(error.code)
        yield ResultEvent(body=msgspec.msgpack.encode(AskResult(said=said)))

    def inner(self, request, number):
        if request.depth:
            return AskRequest(times=request.times)
        return NoopRequest(note=f"number {number}", sleep_seconds=request.sleep_seconds)


MODULE = Ask()
