"""A hub on loopback: what it lists is pinned, ranged and compared."""

import pytest

from aivillage.models.library import pull, sources
from aivillage.models.library.inspection import Found
from aivillage.models.library.pull import Pull
from aivillage.models.library.store import Library
from aivillage.protocols.errors import JobError, RequestError
from tests.integration.hub_server import COMMIT, Hub
from tests.unit.models.test_library import BODY, FACTS


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "a.gguf").write_bytes(BODY)
    monkeypatch.setattr(pull.inspection, "look", lambda _folder: Found(FACTS))
    with Hub(tmp_path / "repository") as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def source(reference="owner/name"):
    return sources.parse(f"hf:{reference}", None)


def pulled(tmp_path, found):
    library = Library(tmp_path / "models")
    return Pull(library, found, name="", bytes_max=1 << 30, progress=lambda *_: None)


def test_a_model_comes_from_a_commit_with_its_licence(hub, tmp_path):
    told = pulled(tmp_path, source("owner/name@main")).run()
    assert told.source == f"hf:owner/name@{COMMIT}"
    assert (told.name, told.facts.licence) == ("name", "mit")
    assert told.size_bytes == len(BODY)


@pytest.mark.parametrize("ignores", [False, True])
def test_a_pull_goes_on_by_range_and_where_the_hub_knows_none(hub, tmp_path, ignores):
    found = pulled(tmp_path, source())
    found.draft.mkdir(parents=True)
    (found.draft / "a.gguf.part").write_bytes(BODY[:4096])
    (found.draft / ".identity").write_text(source().identity)
    hub.ignores_ranges = ignores
    told = found.run()
    assert hub.asked == [("a.gguf", "bytes=4096-")]
    assert told.size_bytes == len(BODY)


def test_what_the_hub_says_of_a_file_is_held_against_it(hub, tmp_path):
    hub.lies = {"lfs": {"size": len(BODY), "sha256": "0" * 64}}
    with pytest.raises(RequestError, match="did not come as"):
        pulled(tmp_path, source()).run()
    hub.lies = {"lfs": {"size": len(BODY) + 1}}
    with pytest.raises(JobError, match="too early"):
        pulled(tmp_path, source()).run()


def test_one_file_of_several_is_named(hub, tmp_path):
    (hub.folder / "b.gguf").write_bytes(BODY[:99])
    with pytest.raises(RequestError, match="name one of the files"):
        source()
    told = pulled(tmp_path, source("owner/name:b.gguf")).run()
    assert (told.name, told.size_bytes) == ("b", 99)
    with pytest.raises(RequestError, match="no file called"):
        source("owner/name:c.gguf")


@pytest.mark.parametrize(
    ("status", "kind"), [(401, RequestError), (404, RequestError), (500, JobError)]
)
def test_a_hub_that_refuses_is_a_typed_error(hub, status, kind):
    hub.status = status
    with pytest.raises(kind, match="hub"):
        source()


def test_a_hub_that_is_not_there_is_a_typed_error(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(JobError, match="gives no more"):
        source()
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    with pytest.raises(RequestError, match="https"):
        source()


def test_a_listing_that_makes_no_sense_is_a_typed_error(hub, monkeypatch):
    monkeypatch.setattr(hub, "listing", list)
    with pytest.raises(JobError, match="listing"):
        source()
    monkeypatch.setattr(hub, "listing", lambda: {"sha": "main", "siblings": []})
    with pytest.raises(RequestError, match="commit"):
        source()
    names = [{"rfilename": "../a.gguf"}, {"rfilename": "a/b.gguf"}, {"rfilename": "x.py"}]
    monkeypatch.setattr(hub, "listing", lambda: {"sha": COMMIT, "siblings": names})
    with pytest.raises(RequestError, match="neither"):
        source()
