"""A stranger's module that does what strangers' modules do. Run in workers by test_workers.py."""

import json
import os
import socket
import sys
import time
import urllib.request
from pathlib import Path

import msgspec

from aivillage.protocols.errors import AivillageError
from aivillage.protocols.ports import PartEvent, ResultEvent, Verdict


class RogueRequest(msgspec.Struct, kw_only=True):
    do: str = "nothing"
    pid: int = 0


class RogueResult(msgspec.Struct, kw_only=True):
    said: str = ""


class Rogue:
    name = "test.rogue"
    title = "Misbehaves"
    positional = "do"
    Request = RogueRequest
    Result = RogueResult

    def prices_micro_credits(self):
        return {"calls": 1}

    def estimate(self, request, machine):
        return {"calls": 1}, 0.1

    def meter(self, request, result):
        return {"calls": 1}

    def check(self, request, result):
        return Verdict(ok=True)

    def run(self, request, context):
        said = getattr(self, request.do)(request, context)
        if hasattr(said, "__next__"):
            yield from said
        else:
            yield ResultEvent(body=msgspec.msgpack.encode(RogueResult(said=str(said))))

    def nothing(self, request, context):
        return "nothing"

    def die(self, request, context):
        sys.stderr.write("going down\n")
        os._exit(3)

    def raise_(self, request, context):
        raise ZeroDivisionError("no such number")

    def hoard(self, request, context):
        """Memory until there is no more."""
        kept = []
        while True:
            kept.append(bytearray(64 << 20))

    def spin(self, request, context):
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pass

    def flood(self, request, context):
        while True:
            yield PartEvent(body=bytes(1 << 20))

    def garbage(self, request, context):
        for fd in range(3, 16):
            try:
                os.write(fd, b"\x00\x00\x00\x05hello" * 3)
            except OSError:
                continue
        time.sleep(60)

    def huge(self, request, context):
        yield PartEvent(body=bytes(8 << 20))

    def prints(self, request, context):
        print("into the pipe?")
        os.write(1, b"straight into the pipe?")
        return sys.stdin.read()

    def reach_out(self, request, context):
        """What became of every way out."""
        ways = {
            "tcp": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
            "tcp6": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM),
            "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "unix": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
            "netlink": lambda: socket.socket(16, socket.SOCK_RAW),
            "http": lambda: urllib.request.urlopen("http://127.0.0.1:1/"),
            "datagram": lambda: _own_datagram_socket().sendto(b"x", "/dev/log"),
            "kill": lambda: os.kill(request.pid, 0),
        }
        outcome = {}
        for name, way in ways.items():
            try:
                way()
                outcome[name] = "open"
            except OSError as error:
                outcome[name] = type(getattr(error, "reason", error)).__name__
        os.kill(os.getpid(), 0)
        return json.dumps(outcome)

    def open_files(self, request, context):
        """What became of reading and writing where it has no business."""
        secret = Path(context.scratch).parents[1] / "identity.key"
        outcome = {}
        for name, way in {
            "read": secret.read_text,
            "list": lambda: list(secret.parent.iterdir()),
            "write": lambda: secret.write_text("mine"),
            "memory": lambda: Path(f"/proc/{request.pid}/environ").read_bytes(),
        }.items():
            try:
                way()
                outcome[name] = "open"
            except OSError as error:
                outcome[name] = type(error).__name__
        return json.dumps(outcome)

    def environment(self, request, context):
        return json.dumps(dict(os.environ))

    def eat(self, request, context):
        return len(bytearray(1 << 34))

    def ask_mesh(self, request, context):
        try:
            answer = context.call("mesh.noop", RogueRequest(do="x"), 50)
        except AivillageError as error:
            return f"refused {error.code}"
        return answer.decode()

    def mark_scratch(self, request, context):
        (Path(context.scratch) / "mark").write_text("x")
        return Path.cwd() == Path(context.scratch).resolve()


def _own_datagram_socket():
    """One end of a pair, which needs no `socket` call; talking to the other end works."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    here.send(b"x")
    if there.recv(1) != b"x":
        raise RuntimeError("a pair of one's own carries nothing")
    return here


MODULE = Rogue()
