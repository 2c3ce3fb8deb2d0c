"""Imports libp2p without the transports and services that this node never switches on.

Importing libp2p loads QUIC, WebSocket, mDNS, UPnP, AutoTLS and their libraries, which is a third
of its memory and half of its time. While it is imported, those libraries are stand-ins; right
after, the stand-ins leave `sys.modules`, so that whoever else wants the real ones gets them.
"""

from __future__ import annotations

import importlib
import logging
import sys
from abc import ABCMeta
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

log = logging.getLogger("aivillage.transport")

LEFT_OUT: Final = frozenset(
    {
        "aioquic",  # QUIC: 2.8 MB/s in this library, not offered
        "aiortc",  # WebRTC, not offered
        "httpx",  # AutoTLS asks a certificate authority; we have no TLS
        "miniupnpc",  # opens ports on the owner's router; never ours to do
        "prometheus_client",  # the library's own metrics server, not started
        "requests",  # AutoTLS again
        "trio_websocket",  # WebSocket, not offered
        "zeroconf",  # mDNS, not started
    }
)


def import_libp2p() -> None:
    """`import libp2p`, lean. A second call, or one after a plain import, does nothing."""
    if "libp2p" in sys.modules:
        return
    with _stand_ins():
        importlib.import_module("libp2p")


@contextmanager
def _stand_ins() -> Iterator[None]:
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Module)]:
            del sys.modules[name]


class _Absent(ABCMeta):
    """The type of every stand-in class: any attribute is one more stand-in."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith(("__", "_abc")):
            raise AttributeError(name)
        return _absent(name)


def _absent(name: str) -> Any:
    # An exception type, since some are named in `except` clauses; calling one says what is wrong.
    def refuse(_self: object, *_args: object, **_kwargs: object) -> None:
        message = f"{name} belongs to a part of libp2p that this node leaves out"
        raise NotImplementedError(message)

    return _Absent(name, (Exception,), {"__init__": refuse})


class _Module(ModuleType):
    """A module in which every name is a stand-in."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _absent(name)
        setattr(self, name, value)
        return value


class _Finder:
    """Finds a stand-in for the libraries in `LEFT_OUT` that nobody has loaded yet."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> Any:
        root = name.partition(".")[0]
        loaded = sys.modules.get(root)
        if root not in LEFT_OUT or (loaded is not None and not isinstance(loaded, _Module)):
            return None
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, _module: ModuleType) -> None:
        """Nothing to run."""
