"""doctor: looks for what is wrong with a node, and says what to do about each thing.

Nothing of ours that needs a package is imported at the top: where a package is missing, the doctor
still says which one. Every check is a function of the `Patient`; whatever it raises is a finding.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import importlib.util
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from aivillage import __version__
from aivillage.cli import show
from aivillage.cli.packages import (
    MODEL_PACKAGES,
    PACKAGES,
    fits,
    headers_missing,
    installed,
    numbers,
)
from aivillage.protocols.errors import EXIT_CONFIG, EXIT_OK, AivillageError

if TYPE_CHECKING:
    from aivillage.cli.client import Client
    from aivillage.node.config import Settings
    from aivillage.node.paths import Paths

PYTHON_LEAST: Final = (3, 11)
SQLITE_LEAST: Final = (3, 51, 3)
"""Earlier ones have a fault in the write-ahead log that can lose a commit."""
SQLITE_STRICT: Final = (3, 37, 0)
"""What the standard library's must be to read our tables."""
DAEMON_SECONDS: Final = 0.8
SANDBOX_SECONDS: Final = 1.5
LAG_P99_MS_MAX: Final = 20.0
FREE_BYTES_LOW: Final = 1 << 30
AUDIT_BYTES_MAX: Final = 8 << 20
"""A book larger than this takes longer than a look."""
SOCKET_PATH_BYTES_MAX: Final = 107
YEARS: Final = (2026, 2100)

Level = Literal["ok", "warn", "FAIL"]


class Finding(NamedTuple):
    """One line of the report."""

    level: Level
    what: str
    detail: str
    next_step: str = ""

    def line(self) -> str:
        step = f"  -> {self.next_step}" if self.next_step else ""
        return f"{self.level:<4}  {self.what:<16}  {self.detail}{step}"


class Patient:
    """The node that is looked at; each thing is read once, when a check first needs it."""

    def __init__(self, data_dir: str | None) -> None:
        self._data_dir = data_dir
        self.is_stuck = False

    @functools.cached_property
    def where(self) -> Paths:
        from aivillage.node.paths import paths

        return paths(self._data_dir)

    @functools.cached_property
    def settings(self) -> Settings:
        """Raises: ConfigError."""
        from aivillage.node import config

        return config.load(self.where.data_dir, {})[0]

    def client(self) -> Client | None:
        """A connection to the daemon; None where none answers."""
        from aivillage.cli.client import Client, NoDaemonError

        try:
            return Client(self.where.socket, timeout_seconds=DAEMON_SECONDS)
        except NoDaemonError:
            return None

    @functools.cached_property
    def status(self) -> dict[str, Any] | None:
        """What the daemon says of itself; None where none answers."""
        from aivillage.cli.client import StuckDaemonError

        client = self.client()
        if client is None:
            return None
        try:
            with client:
                found: dict[str, Any] = client.ask("status")
                return found
        except StuckDaemonError:
            self.is_stuck = True
            return None


Findings = Iterator[Finding]
Check = Callable[[Patient], Findings]


def doctor(args: argparse.Namespace) -> int:
    """Exit 0 where nothing failed, else 3; warnings are for the owner to weigh."""
    patient = Patient(args.data_dir)
    findings: list[Finding] = []
    for name, check in CHECKS:
        said = {finding.detail for finding in findings if finding.level == "FAIL"}
        findings += [f for f in _safely(name, check, patient) if f.detail not in said]
    ok = all(finding.level != "FAIL" for finding in findings)
    if args.json:
        show.as_json({"ok": ok, "checks": [finding._asdict() for finding in findings]})
    else:
        for finding in findings:
            print(finding.line())
    return EXIT_OK if ok else EXIT_CONFIG


def _safely(name: str, check: Check, patient: Patient) -> Findings:
    """The findings of `check`; what it raises is one more."""
    try:
        yield from check(patient)
    except AivillageError as error:
        yield Finding("FAIL", name, error.message, error.next_step)
    except ImportError as error:
        yield Finding("FAIL", name, f"cannot look: {error}", "install what is missing above")
    except OSError as error:
        about = f"{error.filename}: " if error.filename else ""
        yield Finding("FAIL", name, f"{about}{error.strerror or error!r}", "look at its owner")
    except Exception as defect:  # the doctor itself must not fall ill
        yield Finding("FAIL", name, f"the check failed: {defect!r}", "report it with this line")


# --------------------------------------------------------------------------- what is installed


def _python(_patient: Patient) -> Findings:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < PYTHON_LEAST:
        least = ".".join(map(str, PYTHON_LEAST))
        yield Finding("FAIL", "python", f"{version} is too old", f"install Python {least} or newer")
    else:
        yield Finding("ok", "python", f"{version} at {sys.executable}")


def _packages(_patient: Patient) -> Findings:
    for name, wish in PACKAGES.items():
        version = installed(name)
        if version and fits(version, wish):
            yield Finding("ok", name, version)
            continue
        detail = f"{version} is here, {wish} is needed" if version else f"missing ({wish})"
        if name == "libp2p" and not version and (lacks := headers_missing()):
            lack = ", ".join(lacks)
            yield Finding(
                "FAIL", name, f"{detail}; building it needs {lack}",
                f"apt-get install -y {' '.join(lacks.values())}, then {_install(name + wish)}",
            )  # fmt: skip
        else:
            yield Finding("FAIL", name, detail, _install(name + wish))


def _sqlite(_patient: Patient) -> Findings:
    import sqlite3

    import apsw

    writer = apsw.sqlite_lib_version()
    if numbers(writer) < SQLITE_LEAST:
        least = ".".join(map(str, SQLITE_LEAST))
        step = _install(f"--upgrade 'apsw>={least}'")
        yield Finding("FAIL", "sqlite writer", f"{writer}, at least {least} is needed", step)
    else:
        yield Finding("ok", "sqlite writer", f"{writer} (writes the ledger)")
    if sqlite3.sqlite_version_info < SQLITE_STRICT:
        detail = f"{sqlite3.sqlite_version} cannot read the ledger without a running node"
        yield Finding("warn", "sqlite reader", detail, "start the node before balance or history")
    else:
        yield Finding("ok", "sqlite reader", f"{sqlite3.sqlite_version} (the standard library's)")


def _models(_patient: Patient) -> Findings:
    """Told from metadata: importing torch takes longer than the doctor may."""
    found = {name: installed(name) for name in MODEL_PACKAGES}
    bad = [
        name
        for name, wish in MODEL_PACKAGES.items()
        if not (found[name] and fits(str(found[name]), wish) and importlib.util.find_spec(name))
    ]
    if bad:
        listing = ", ".join(f"{name} {found[name] or 'missing'}" for name in bad)
        is_slow = bad == ["openvino"]
        lack = (
            "answers are computed by torch, slower"
            if is_slow
            else "this node can buy, but serves no model"
        )
        detail = f"{listing}: {lack}"
        wishes = " ".join(f"'{name}{MODEL_PACKAGES[name]}'" for name in bad)
        yield Finding("warn", "model packages", detail, _install(wishes))
    else:
        listing = ", ".join(f"{name} {version}" for name, version in found.items())
        yield Finding("ok", "model packages", listing)


def _weights(_patient: Patient) -> Findings:
    from aivillage.models.inference import catalogue
    from aivillage.protocols.errors import ConfigError

    try:
        path = catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
    except ConfigError as error:
        yield Finding("warn", "packaged model", error.message, error.next_step)
    else:
        size_mb = path.stat().st_size / 1e6
        yield Finding("ok", "packaged model", f"{catalogue.DEFAULT}, {size_mb:.0f} MB")


def _sandbox(_patient: Patient) -> Findings:
    """Tried in a child, since it cannot be taken off."""
    import aivillage

    code = "from aivillage.models import sandbox; print(sandbox.deny_network())"
    source = str(Path(aivillage.__file__).parent.parent)
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True, text=True, check=False, timeout=SANDBOX_SECONDS,
        )  # fmt: skip
        why_not = done.stdout.strip() if done.returncode == 0 else "the trial process failed"
    except subprocess.TimeoutExpired:
        why_not = f"the trial took longer than {SANDBOX_SECONDS} s"
    if why_not:
        step = "run on Linux, x86-64 or AArch64, or do without modules of other packages"
        yield Finding("warn", "sandbox", f"workers cannot be fenced in: {why_not}", step)
    else:
        yield Finding("ok", "sandbox", "workers have no network (seccomp)")


def _device(patient: Patient) -> Findings:
    from aivillage.cli.doctor_device import told

    yield Finding(*told(patient.settings, patient.status))


# --------------------------------------------------------------------------- what is on the disk


def _ray(patient: Patient) -> Findings:
    if patient.settings.executor == "ray":
        from aivillage.cli.doctor_ray import cluster

        detail, next_step = cluster(patient.settings)
        yield Finding("FAIL" if next_step else "ok", "ray", detail, next_step)


def _data_folder(patient: Patient) -> Findings:
    folder = patient.where.data_dir
    if not folder.exists():
        yield Finding("warn", "data folder", f"{folder} is not there yet", "aivillage-node init")
        return
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode):
        yield Finding("FAIL", "data folder", f"{folder} is no folder", "choose another --data-dir")
    elif found.st_uid != os.getuid():
        step = f"sudo chown -R {os.getuid()} {folder}"
        yield Finding("FAIL", "data folder", f"{folder} belongs to user {found.st_uid}", step)
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("FAIL", "data folder", f"{folder} cannot be written", f"chmod 700 {folder}")
    elif found.st_mode & 0o077:
        yield Finding(
            "warn", "data folder", f"others can look into {folder}", f"chmod 700 {folder}"
        )
    else:
        yield Finding("ok", "data folder", str(folder))


def _key(patient: Patient) -> Findings:
    from aivillage.node import identity

    folder = patient.where.data_dir
    if not identity.exists(folder):
        yield Finding("warn", "identity", "no key yet", "aivillage-node init")
    else:
        yield Finding("ok", "identity", identity.peer_of(identity.load(folder)))


def _disk(patient: Patient) -> Findings:
    from aivillage.node.monitor import FREE_BYTES_MIN

    folder = patient.where.data_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.1f} GB free under {folder}"
    if free < FREE_BYTES_MIN:
        yield Finding("FAIL", "disk", f"{detail}: the node takes no work", "free some space")
    elif free < FREE_BYTES_LOW:
        yield Finding("warn", "disk", f"{detail}: not much", "free some space")
    else:
        yield Finding("ok", "disk", detail)


def _config(patient: Patient) -> Findings:
    from aivillage.node.config import Settings

    settings, stock = patient.settings, Settings()
    changed = [n for n in Settings.__struct_fields__ if getattr(settings, n) != getattr(stock, n)]
    yield Finding("ok", "config", f"set: {', '.join(changed)}" if changed else "all defaults")
    if settings.dev_mode:
        step = "unset AIVILLAGE_DEV_MODE, or dev_mode in config.toml"
        yield Finding("warn", "config", "development mode: looser than is good for use", step)


def _ledger(patient: Patient) -> Findings:
    """Through the daemon where one runs, else from the file."""
    from aivillage.ledger import reader

    path = patient.where.ledger
    if not path.exists():
        yield Finding("ok", "ledger", "none yet: the first start makes it")
        return
    size_bytes = path.stat().st_size
    if size_bytes > AUDIT_BYTES_MAX:
        detail = f"{size_bytes / 1e6:.0f} MB: its audit takes longer than this look"
        yield Finding("warn", "ledger", detail, "aivillage-node audit")
        return
    client = patient.client() if patient.status is not None else None
    if client is None:
        report = reader.read_audit(path)
        ok, entries, first_error = report.ok, report.entries, report.first_error
    else:
        with client:
            found = client.ask("audit")
        ok, entries, first_error = found["ok"], found["entries"], found["first_error"]
    if ok:
        yield Finding("ok", "ledger", f"the book is right: {entries} entries")
    else:
        step = "keep a copy of ledger.db, then: aivillage-node audit"
        yield Finding("FAIL", "ledger", f"the book is wrong: {first_error}", step)


# --------------------------------------------------------------------------- what runs


def _port(patient: Patient) -> Findings:
    host, _, text = patient.settings.listen.rpartition(":")
    if not (text.isdigit() and int(text) < 65_536):
        raise ValueError(f"listen = {patient.settings.listen!r} is no address:port")
    if patient.status is not None:
        addresses = ", ".join(patient.status["addresses"]) or "nowhere"
        yield Finding("ok", "port", f"held by our node, which is reached at {addresses}")
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(text)))
            probe.listen(1)
        except OSError as error:
            detail = f"{patient.settings.listen}: {error.strerror}"
            step = "aivillage-node start --listen 0.0.0.0:PORT, with a port that is free"
            yield Finding("FAIL", "port", detail, step)
            return
    yield Finding("ok", "port", f"{patient.settings.listen} is free")


def _control_socket(patient: Patient) -> Findings:
    path = patient.where.socket
    folder = next(parent for parent in path.parents if parent.exists())
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        step = "set XDG_RUNTIME_DIR to a folder with a shorter path"
        yield Finding("FAIL", "control socket", f"{path} is too long a path", step)
    elif not os.access(folder, os.W_OK | os.X_OK):
        step = "set XDG_RUNTIME_DIR to a folder of yours"
        yield Finding("FAIL", "control socket", f"{folder} cannot be written", step)
    elif patient.status is not None:
        yield Finding("ok", "control socket", f"{path} answers")
    elif path.exists():
        step = "aivillage-node start clears it, unless a node there is stuck: look for its process"
        yield Finding("warn", "control socket", f"{path} is there, nobody answers", step)
    else:
        yield Finding("ok", "control socket", f"{path} is free")


def _daemon(patient: Patient) -> Findings:
    status = patient.status
    if patient.is_stuck:
        step = "end its process, then: aivillage-node start"
        yield Finding("FAIL", "node", "it runs, and does not answer", step)
        return
    if status is None:
        yield Finding("warn", "node", "not running", "aivillage-node start")
        return
    if status["version"] != __version__:
        detail = f"the running node is {status['version']}, this command {__version__}"
        yield Finding("FAIL", "node", detail, "aivillage-node stop, then start")
    else:
        yield Finding("ok", "node", f"{status['version']}, up {status['uptime_seconds']:.0f} s")
    if status["state"] != "ready":
        by_owner = status["state"].startswith("closed to others")
        step = "aivillage-node limits" if by_owner else "aivillage-node status"
        yield Finding("warn" if by_owner else "FAIL", "node", status["state"], step)
    lag = status["loop_lag_ms"]["p99"]
    if lag > LAG_P99_MS_MAX:
        detail = f"its loop is {lag} ms late (p99): the machine is overloaded"
        yield Finding("warn", "node", detail, "set fewer slots, or stop other programs")


def _reachable(patient: Patient) -> Findings:
    """As a villager found it: this machine cannot tell by itself."""
    found = (patient.status or {}).get("reachable")
    if found is not None:
        level: Level = "warn" if found["state"] == "not reachable" else "ok"
        yield Finding(
            level, "from outside", f"{found['state']}: {found['why']}", found["next_step"]
        )


def _village_key(patient: Patient) -> Findings:
    from aivillage.node import village_key

    key = village_key.load(patient.where.data_dir)
    mine = village_key.fingerprint(key) if key else ""
    running = (patient.status or {}).get("private", {"fingerprint": mine, "refused": 0})
    if running["fingerprint"] != mine:
        detail = f"the running node has the key {running['fingerprint'][:8] or 'none'}, the file "
        step = "aivillage-node stop, then start"
        yield Finding("warn", "village key", f"{detail}{mine[:8] or 'none'}", step)
    elif key is None:
        yield Finding("ok", "village key", "none: whoever reaches this node can connect")
    else:
        yield Finding("ok", "village key", f"only who has it can connect: {mine}")
    if running["refused"]:
        detail = (
            f"{running['refused']} connections refused, the last from {running['last_refused']}"
        )
        step = "if that is a villager: aivillage-node invite, and join there"
        yield Finding("warn", "village key", detail, step)


def _clock(_patient: Patient) -> Findings:
    now = dt.datetime.now(dt.UTC)
    if YEARS[0] <= now.year < YEARS[1]:
        yield Finding("ok", "clock", f"{now:%Y-%m-%d %H:%M:%S} UTC")
    else:
        detail = f"it says {now:%Y-%m-%d}: signatures and quotes would count as stale"
        yield Finding("FAIL", "clock", detail, "set the clock: timedatectl set-ntp true")


CHECKS: Final[tuple[tuple[str, Check], ...]] = (
    ("python", _python),
    ("packages", _packages),
    ("sqlite", _sqlite),
    ("config", _config),
    ("model packages", _models),
    ("packaged model", _weights),
    ("device", _device),
    ("sandbox", _sandbox),
    ("ray", _ray),
    ("clock", _clock),
    ("data folder", _data_folder),
    ("identity", _key),
    ("village key", _village_key),
    ("disk", _disk),
    ("node", _daemon),
    ("control socket", _control_socket),
    ("port", _port),
    ("from outside", _reachable),
    ("ledger", _ledger),
)
"""What does not need a node first, then the node."""


def _install(what: str) -> str:
    quoted = f"'{what}'" if re.search(r"[<>=]", what) and "'" not in what else what
    return f"{sys.executable} -m pip install {quoted}"
