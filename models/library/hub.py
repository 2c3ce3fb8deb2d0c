"""`hf:OWNER/NAME[@REVISION][:FILE]`: models from a hub that speaks Hugging Face's HTTP.

The revision is pinned to a commit before a byte is fetched, so that a resumed pull is of the same
files, and large files are compared with the sha-256 that the hub says. No token is sent: a model
that asks for one is fetched by the hub's own client, and pulled with `file:`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from aivillage.models.library.sources import Wanted, chosen, named
from aivillage.protocols.errors import AivillageError, JobError, RequestError

ENDPOINT: Final = "https://huggingface.co"
"""The environment variable HF_ENDPOINT names a mirror, as for the hub's own client."""
SILENCE_SECONDS_MAX: Final = 60.0
LISTING_BYTES_MAX: Final = 8 << 20
_REFERENCE: Final = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w.-]+))?"
)


class HubSource:
    """One repository at one commit."""

    def __init__(self, reference: str) -> None:
        """Asks the hub what there is.

        Raises:
            RequestError: no such model, or none that runs here.
            JobError: the hub cannot be reached.
        """
        found = _REFERENCE.fullmatch(reference)
        if found is None:
            raise RequestError(
                f"{reference[:200]!r} names no model of a hub",
                next_step="hf:OWNER/NAME, hf:OWNER/NAME@REVISION, hf:OWNER/NAME:FILE.gguf",
            )
        self._repo, wanted = found["repo"], found["file"]
        revision = urllib.parse.quote(found["revision"] or "main", safe="")
        told = _listing(f"/api/models/{self._repo}/revision/{revision}?blobs=true")
        self._commit = str(told.get("sha", ""))
        if not re.fullmatch(r"[0-9a-f]{40}", self._commit):
            raise RequestError(f"the hub names no commit for {reference}")
        siblings = {str(each.get("rfilename")): each for each in told.get("siblings", [])}
        if wanted and wanted not in siblings:
            raise RequestError(f"{self._repo} has no file called {wanted}")
        names = [wanted] if wanted else chosen(list(siblings), self._repo)
        self._files = tuple(_wanted(siblings[name]) for name in names)
        self.text = f"hf:{self._repo}@{self._commit}" + (f":{wanted}" if wanted else "")
        self.name = Path(wanted).stem if wanted else self._repo.rpartition("/")[2]
        self.licence = _licence(told)
        self.identity = self.text

    def files(self, draft: Path | None) -> tuple[Wanted, ...]:
        del draft
        return self._files

    @contextlib.contextmanager
    def reading(self, file: Wanted, offset: int) -> Iterator[BinaryIO]:
        """Raises: JobError: the hub gives no more; what came is kept."""
        place = urllib.parse.quote(file.place)
        with _opened(f"/{self._repo}/resolve/{self._commit}/{place}", offset) as answer:
            yield answer


def _wanted(told: dict[str, Any]) -> Wanted:
    large = told.get("lfs") or {}
    size = large.get("size", told.get("size"))
    sha256 = str(large.get("sha256", ""))
    return Wanted(
        name=named(str(told["rfilename"])),
        place=str(told["rfilename"]),
        size_bytes=size if type(size) is int and size >= 0 else None,
        sha256=sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else "",
    )


def _licence(told: dict[str, Any]) -> str:
    tags = [str(tag) for tag in told.get("tags", [])]
    found = [tag.partition(":")[2] for tag in tags if tag.startswith("license:")]
    return found[0][:128] if found else ""


def _listing(path: str) -> dict[str, Any]:
    with _opened(path, 0) as answer:
        body = answer.read(LISTING_BYTES_MAX + 1)
    try:
        told = json.loads(body) if len(body) <= LISTING_BYTES_MAX else None
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise JobError("the hub's listing cannot be read", next_step="pull again later")
    return told


@contextlib.contextmanager
def _opened(path: str, offset: int) -> Iterator[BinaryIO]:
    endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise RequestError("HF_ENDPOINT begins with https:// or http://")
    headers = {"User-Agent": "aivillage"}
    request = urllib.request.Request(endpoint + path, headers=headers)  # noqa: S310 - see above
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    try:
        with urllib.request.urlopen(request, timeout=SILENCE_SECONDS_MAX) as answer:  # noqa: S310
            if offset and answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                _skip(answer, offset)
            yield cast("BinaryIO", answer)
    except urllib.error.HTTPError as error:
        raise _refused(error) from None
    except (OSError, http.client.HTTPException) as error:
        raise JobError(
            f"{endpoint} gives no more: {error}", next_step="pull again: it goes on from here"
        ) from None


def _skip(answer: http.client.HTTPResponse, count: int) -> None:
    """The hub began anew: what is here already is read past."""
    while count:
        gone = len(answer.read(min(count, 1 << 20)))
        if not gone:
            raise JobError("the hub has less of the file than is here", next_step="pull again")
        count -= gone


def _refused(error: urllib.error.HTTPError) -> AivillageError:
    if error.code in {401, 403, 404}:
        return RequestError(
            f"the hub has no such model for everybody (status {error.code})",
            next_step="where it asks for a token: fetch it with the hub's own client, then file:",
        )
    return JobError(f"the hub refuses: status {error.code}", next_step="pull again later")
