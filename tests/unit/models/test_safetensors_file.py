"""safetensors headers: read right, or refused with a reason, at each limit and one beyond."""

import json

import pytest

from aivillage.models.library import safetensors_file as reader
from aivillage.protocols.errors import RequestError

ONE = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(path, header, body=bytes(24), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + body)
    return path


def test_names_shapes_and_places_are_read(tmp_path):
    header = {"__metadata__": {"format": "pt"}} | ONE
    header["v"] = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}
    places = reader.read_header(write(tmp_path / "x", header, bytes(32)))
    assert [(p.name, p.kind, p.shape, p.count) for p in places] == [
        ("w", "F32", (2, 3), 6), ("v", "BF16", (4,), 4),
    ]  # fmt: skip


def test_what_the_reference_writes_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("safetensors.torch").save_file
    tensors = {
        "a": torch.zeros(3, 5),
        "b": torch.ones(7, dtype=torch.bfloat16),
        "c": torch.tensor(1),
    }
    save(tensors, tmp_path / "x")
    found = {p.name: p.shape for p in reader.read_header(tmp_path / "x")}
    assert found == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F8_E4M3"},
        {"dtype": 7},
        {"shape": [2, -3]},
        {"shape": [2, 3.0]},
        {"shape": [True, 6]},
        {"shape": "23"},
        {"shape": [1 << 40, 0]},
        {"data_offsets": [0, 20]},
        {"data_offsets": [4, 28]},
        {"data_offsets": [0]},
        {"data_offsets": [24, 0]},
        {"data_offsets": None},
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, change):
    with pytest.raises(RequestError, match="safetensors"):
        reader.read_header(write(tmp_path / "x", {"w": ONE["w"] | change}))


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"{", b"\xff\xfe", b'{"w": 1}', b'{"w": []}', b'{"w": {}}', b"[" * 100_000,
        b'{"w": %(one)s, "w": %(one)s}' % {b"one": json.dumps(ONE["w"]).encode()},
    ],
)  # fmt: skip
def test_a_header_that_is_no_table_of_tensors_is_refused(tmp_path, header):
    with pytest.raises(RequestError, match="safetensors"):
        reader.read_header(write(tmp_path / "x", header))


def test_overlaps_holes_and_bytes_of_nothing_are_refused(tmp_path):
    two = ONE | {"v": {"dtype": "F32", "shape": [6], "data_offsets": [12, 36]}}
    for header, size in ((two, 36), (ONE, 28), (ONE, 20), ({}, 1)):
        with pytest.raises(RequestError, match="safetensors"):
            reader.read_header(write(tmp_path / "x", header, bytes(size)))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    raw = write(tmp_path / "whole", ONE).read_bytes()
    for cut in range(len(raw)):
        (tmp_path / "x").write_bytes(raw[:cut])
        with pytest.raises(RequestError, match="safetensors"):
            reader.read_header(tmp_path / "x")
    with pytest.raises(RequestError, match="safetensors"):
        reader.read_header(tmp_path / "missing")


def test_a_boast_of_a_long_header_reads_nothing(tmp_path):
    path = write(tmp_path / "x", b"{}", length=2**63)
    with pytest.raises(RequestError, match="TOO_LARGE"):
        reader.read_header(path)


def _padded(size):
    return b"{}" + b" " * (size - 2)


def test_each_limit_holds_at_one_more(tmp_path, monkeypatch):
    most = reader.HEADER_BYTES_MAX
    assert reader.read_header(write(tmp_path / "x", _padded(most), b"")) == []
    with pytest.raises(RequestError, match="TOO_LARGE"):
        reader.read_header(write(tmp_path / "x", _padded(most + 1), b""))

    def empty(count, name="t"):
        place = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        return write(tmp_path / "x", {f"{name}{n}": place for n in range(count)}, b"")

    assert len(reader.read_header(empty(reader.TENSORS_MAX))) == reader.TENSORS_MAX
    with pytest.raises(RequestError, match="TOO_LARGE"):
        reader.read_header(empty(reader.TENSORS_MAX + 1))
    assert reader.read_header(empty(1, "n" * (reader.NAME_BYTES_MAX - 1)))
    with pytest.raises(RequestError, match="a name"):
        reader.read_header(empty(1, "n" * reader.NAME_BYTES_MAX))
    for rank in (reader.DIMENSIONS_MAX, reader.DIMENSIONS_MAX + 1):
        place = {"dtype": "U8", "shape": [1] * rank, "data_offsets": [0, 1]}
        path = write(tmp_path / "x", {"t": place}, b"1")
        if rank == reader.DIMENSIONS_MAX:
            assert reader.read_header(path)
        else:
            with pytest.raises(RequestError, match="no sense"):
                reader.read_header(path)
