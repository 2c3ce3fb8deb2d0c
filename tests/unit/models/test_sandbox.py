"""The system call filter, instruction by instruction, for both machines it is written for."""

import errno
import os
import struct

import pytest

from aivillage.models import sandbox

ALLOW = 0x7FFF0000
DENY = 0x00050000 | errno.EPERM


def verdict(machine, number, *arguments, architecture=None, on_gpu=False):
    """What the filter says to a call: classic BPF, as the kernel runs it."""
    words = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    architecture = architecture or sandbox._ARCHITECTURE[machine]
    data = struct.pack("=IIQ6Q", number, architecture, 0, *words)
    program = list(struct.iter_unpack("=HBBI", sandbox._program(machine, on_gpu=on_gpu)))
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = program[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return value
        else:
            taken = accumulator == value if code == 0x15 else accumulator >= value
            at += if_true if taken else if_false


NUMBERS = {
    "x86_64": {"read": 0, "socketpair": 53, "socket": 41, "kill": 62, "tkill": 200, "sendto": 44},
    "aarch64": {
        "read": 63, "socketpair": 199, "socket": 198, "kill": 129, "tkill": 130, "sendto": 206,
    },
}  # fmt: skip


@pytest.mark.parametrize("machine", sorted(NUMBERS))
def test_the_filter_denies_ways_out_and_lets_work_pass(machine):
    call = NUMBERS[machine]
    assert verdict(machine, call["read"]) == ALLOW
    assert verdict(machine, call["socketpair"]) == ALLOW
    assert verdict(machine, call["socket"], 2) == DENY
    assert verdict(machine, call["tkill"], os.getpid()) == DENY
    assert all(verdict(machine, number) == DENY for number in sandbox._DENIED[machine])


@pytest.mark.parametrize("machine", sorted(NUMBERS))
def test_signals_go_to_itself_only(machine):
    kill = NUMBERS[machine]["kill"]
    assert verdict(machine, kill, os.getpid(), 9) == ALLOW
    assert verdict(machine, kill, 1, 9) == DENY
    assert verdict(machine, kill, 2**32 - 1, 9) == DENY  # everybody


@pytest.mark.parametrize("machine", sorted(NUMBERS))
@pytest.mark.parametrize("address", [1, 2**32, 2**63])
def test_bytes_go_to_no_named_socket(machine, address):
    sendto = NUMBERS[machine]["sendto"]
    assert verdict(machine, sendto, 3, 4096, 1, 0, 0) == ALLOW
    assert verdict(machine, sendto, 3, 4096, 1, 0, address) == DENY


def test_other_numberings_of_the_same_kernel_are_denied():
    assert verdict("x86_64", 0x40000000) == DENY  # x32
    assert verdict("x86_64", 3, architecture=0x40000003) == DENY  # i386


UNIX, INTERNET = 1, 2


@pytest.mark.parametrize("machine", sorted(NUMBERS))
def test_an_engine_on_a_gpu_may_listen_at_a_unix_socket_and_nothing_more(machine):
    def said(number, *arguments):
        return verdict(machine, number, *arguments, on_gpu=True)

    a_socket, *listening = sandbox._OF_GPU[machine]
    assert a_socket == NUMBERS[machine]["socket"]
    assert said(a_socket, UNIX) == ALLOW
    assert said(a_socket, INTERNET) == said(a_socket, 10) == said(a_socket, 16) == DENY
    assert [said(number) for number in listening] == [ALLOW, ALLOW]
    rest = set(sandbox._DENIED[machine]) - set(sandbox._OF_GPU[machine])
    assert len(rest) == len(sandbox._DENIED[machine]) - 3
    assert {said(number) for number in rest} == {DENY}
    assert said(NUMBERS[machine]["kill"], 1, 9) == DENY
