"""The worker process: `python -m aivillage.models.worker`, started by a daemon and by nobody else.

Commands come in on stdin, replies go out on stdout and nothing else does: both descriptors are
taken away before any library or module of a stranger's runs. One thread reads, the main one works.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol, cast, runtime_checkable

import msgspec

from aivillage.models import registry, sandbox
from aivillage.models import worker_messages as say
from aivillage.models.description import CarefulModule, checked, described
from aivillage.models.file_fence import fence_files
from aivillage.models.inference import catalogue
from aivillage.protocols.codec import unpack
from aivillage.protocols.errors import (
    AivillageError,
    JobError,
    RequestError,
    from_code,
)
from aivillage.protocols.ports import (
    Engine,
    FedEngine,
    Module,
    RecheckingEngine,
    ResultEvent,
)
from aivillage.protocols.prefixes import PrefixTokens, ReusingEngine

if TYPE_CHECKING:
    from aivillage.models.inference.engine_stage import StageEngine

COMMANDS_WAITING_MAX: Final = 4_096
"""A daemon waits at the pipe beyond this."""


@runtime_checkable
class WaitingEngine(Protocol):
    """An engine that waits for others: after a step that moved nothing, one may follow that does.

    Its `step` waits a little itself, so that nobody turns in circles.
    """

    @property
    def waits(self) -> bool: ...


class Pipes:
    """Both ends of the talk with the daemon."""

    def __init__(self, commands: BinaryIO, replies: BinaryIO) -> None:
        self._commands = commands
        self._replies = replies
        self.waiting: queue.Queue[say.Command] = queue.Queue(COMMANDS_WAITING_MAX)
        self.answers: queue.Queue[say.CallAnswer] = queue.Queue()
        self._cancelled_run = 0

    def read_forever(self) -> None:
        """Ends the process when the daemon hangs up: nobody is left to work for."""
        while (command := self.read()) is not None:
            if isinstance(command, say.CancelRun):
                self._cancelled_run = command.id  # runs follow each other: the last one counts
            elif isinstance(command, say.CallAnswer):
                self.answers.put(command)
            else:
                self.waiting.put(command)
        os._exit(0)

    def read(self) -> say.Command | None:
        """The next command off the pipe; None: the daemon hung up."""
        header = self._commands.read(say.LENGTH_BYTES)
        if len(header) < say.LENGTH_BYTES:
            return None
        return say.commands.decode(self._commands.read(int.from_bytes(header, "big")))

    def write(self, *replies: say.Reply) -> None:
        for reply in replies:
            self._replies.write(say.framed(reply))
        self._replies.flush()

    def is_cancelled(self, run: int) -> bool:
        return run == self._cancelled_run

    def next(self, *, block: bool) -> say.Command | None:
        try:
            return self.waiting.get(block=block)
        except queue.Empty:
            return None


class RunContext:
    """`ports.Context`, spoken over the pipes."""

    def __init__(self, run: say.Run, pipes: Pipes) -> None:
        self._run = run
        self._pipes = pipes
        self.delivered = run.delivered
        self.deadline_seconds = run.deadline_seconds
        self.seed = run.seed
        self.scratch = run.scratch or str(Path.cwd())

    def cancelled(self) -> bool:
        return self._pipes.is_cancelled(self._run.id)

    def call(self, operation: str, request: msgspec.Struct, budget: int) -> bytes:
        """A sub-job on the mesh, paid by whoever runs this module, up to `budget`.

        Raises:
            AivillageError: whatever befell the sub-job.
        """
        body = msgspec.msgpack.encode(request)
        self._pipes.write(
            say.SubCall(id=self._run.id, operation=operation, request=body, budget=budget)
        )
        while (answer := self._pipes.answers.get()).id != self._run.id:
            pass  # of a run that is over
        if answer.code:
            raise from_code(answer.code, answer.message, answer.next_step)
        return answer.result


def main() -> None:
    pipes = Pipes(*_take_descriptors())
    _restrict(pipes)
    # Not before: the fences hold for the thread that puts them up, and for those it starts then.
    threading.Thread(target=pipes.read_forever, daemon=True).start()
    while True:
        command = pipes.next(block=True)
        if isinstance(command, say.Load):
            serve_engine(command, pipes)
        elif isinstance(command, say.ModuleCommand):
            serve_module(command, pipes)


def _take_descriptors() -> tuple[BinaryIO, BinaryIO]:
    """The pipes under new numbers; 0 reads nothing and 1 writes to stderr from here on."""
    commands, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return os.fdopen(commands, "rb"), os.fdopen(replies, "wb")


def _restrict(pipes: Pipes) -> None:
    start = pipes.read()
    if not isinstance(start, say.Start):
        sys.exit("the first command says the limits")
    # CUDA reserves far more than it uses; what it takes of the GPU has a limit of its own.
    data_bytes_max = sandbox.NO_LIMIT if start.gpu else start.memory_bytes_max
    sandbox.limit(memory_bytes_max=data_bytes_max, nice=start.nice)
    scratch = start.scratch or str(Path.cwd())
    os.chdir(scratch)
    catalogue.use_library(start.library)
    no_fence = no_filter = "switched off in the settings"
    if start.sandbox:
        no_fence = fence_files(readable=start.readable, writable=[scratch], on_gpu=start.gpu)
        no_filter = sandbox.deny_network(on_gpu=start.gpu)
    pipes.write(
        say.Started(
            sandboxed=not no_filter, fenced=not no_fence, why_not=f"{no_filter} {no_fence}".strip()
        )
    )


# --------------------------------------------------------------------------- modules


def serve_module(command: say.ModuleCommand, pipes: Pipes) -> None:
    """Answers one command of a module; whatever the module raises becomes a typed failure."""
    try:
        module = registry.load(registry.entry(command.operation).target)
        if isinstance(command, say.Run):
            _run(module, command, pipes)
        else:
            pipes.write(_answer(module, command))
    except AivillageError as error:
        pipes.write(say.failed(error, call=command.id))
    except Exception as error:
        pipes.write(say.failed(_as_job_error(command.operation, error), call=command.id))


def _answer(
    module: Module, command: say.Describe | say.Estimate | say.Meter | say.Check
) -> say.Reply:
    if isinstance(command, say.Describe):
        return say.Described(id=command.id, info=described(module, command.operation))
    request = unpack(module.Request, command.request)
    if isinstance(command, say.Estimate):
        if isinstance(module, CarefulModule):
            module.validate(request)
        usage, seconds = module.estimate(request, command.machine)
        return say.Estimated(id=command.id, usage=dict(usage), seconds=seconds)
    if isinstance(command, say.Check):
        return say.Checked(id=command.id, verdict=checked(module, request, command.result))
    result = unpack(module.Result, command.result)
    return say.Metered(id=command.id, usage=dict(module.meter(request, result)))


def _run(module: Module, run: say.Run, pipes: Pipes) -> None:
    request = unpack(module.Request, run.request)
    sandbox.limit_cpu(run.deadline_seconds)
    context = RunContext(run, pipes)
    for event in module.run(request, context):
        ran = say.Ran(id=run.id, event=event)
        if isinstance(event, ResultEvent):  # nothing that comes after it counts
            pipes.write(ran, say.RunEnded(id=run.id))
            return
        pipes.write(ran)
        if context.cancelled():
            break
    code = "CANCELLED" if context.cancelled() else "JOB_FAILED"
    raise JobError(f"{run.operation} ended without a result", code=code)


def _as_job_error(operation: str, error: Exception) -> JobError:
    return JobError(
        f"{operation} raised {type(error).__name__}: {str(error)[:500]}",
        next_step="report it to whoever wrote the module",
    )


# --------------------------------------------------------------------------- engines


def serve_engine(load: say.Load, pipes: Pipes) -> None:
    """Loads a model and serves its sessions for as long as the process lives."""
    try:
        engine, request_type, seconds = _engine(load)
    except AivillageError as error:
        pipes.write(say.failed(error))
        return
    pipes.write(say.Loaded(info=engine.info(), load_seconds=seconds))
    can_move, reuses = False, isinstance(engine, ReusingEngine)
    while True:
        # Idle: wait for a command. Busy: take all that came in during the step.
        command = pipes.next(block=not can_move)
        while command is not None:
            _apply(engine, request_type, command, pipes)
            command = pipes.next(block=False)
        frames = engine.step()
        can_move = bool(frames) or (isinstance(engine, WaitingEngine) and engine.waits)
        if frames:
            prefix = engine.prefix_tokens if reuses else PrefixTokens()
            pipes.write(say.Frames(frames=frames, prefix=prefix))


def _engine(load: say.Load) -> tuple[Any, type[msgspec.Struct], float]:
    from aivillage.models.inference import engine_choice, generate, stages

    known = catalogue.known(load.model)
    engine: Any
    if load.part == "stage":
        engine = _stage(known, load)
        return engine, stages.StageRequest, engine.load_seconds
    if load.part == "driver":
        from aivillage.models.inference.split import SplitDriver

        return SplitDriver(known, slots=load.slots), generate.GenerateRequest, 0.0
    if load.way_out >= 0:
        from aivillage.models.inference.engine_openai import OpenaiEngine
        from aivillage.models.way_out import WayOut

        engine = OpenaiEngine(known, slots=load.slots, dial=WayOut(load.way_out).dial)
        return engine, generate.GenerateRequest, engine.load_seconds
    threads = int(os.environ["OMP_NUM_THREADS"])  # by the daemon, as its owner set them
    engine = engine_choice.engine_of(
        known, slots=load.slots, threads=threads, engine=load.engine, device=load.device
    )
    return engine, generate.GenerateRequest, engine.load_seconds


def _stage(known: catalogue.KnownModel, load: say.Load) -> StageEngine:
    from aivillage.models.inference import engine_choice, placement
    from aivillage.models.inference.engine_stage import StageEngine

    catalogue.require_same(known, load.weights_sha256)
    at = placement.prepare(load.device)
    with engine_choice.short_of_memory("torch", known, load.device):
        return StageEngine(known, *load.layers, slots=load.slots, at=at)


def _apply(
    engine: Engine, request_type: type[msgspec.Struct], command: say.Command, pipes: Pipes
) -> None:
    if isinstance(command, say.Allow):
        engine.allow(command.session, command.units)
    elif isinstance(command, say.Feed):
        cast("FedEngine", engine).feed(command.session, command.body)
    elif isinstance(command, say.CancelSession):
        engine.cancel(command.session)
    elif isinstance(command, say.Add):
        try:
            _add(engine, unpack(request_type, command.request), command)
        except AivillageError as error:
            pipes.write(say.failed(error, session=command.session))


def _add(engine: Engine, request: msgspec.Struct, command: say.Add) -> None:
    if command.claim is None and isinstance(engine, ReusingEngine):
        engine.add(command.session, request, command.delivered, command.scope)
    elif command.claim is None:
        engine.add(command.session, request, command.delivered)
    elif isinstance(engine, RecheckingEngine):
        engine.recheck(command.session, request, command.claim)
    else:
        raise RequestError("this engine rechecks nothing", code="NOT_OFFERED")


if __name__ == "__main__":
    sandbox.die_with_parent(int(sys.argv[1]))
    main()
