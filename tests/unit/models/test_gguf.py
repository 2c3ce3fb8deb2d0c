"""GGUF files: read right, or refused with a reason."""

import struct
import warnings

import pytest

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

from aivillage.models.inference import gguf_model  # noqa: E402
from aivillage.models.inference.gguf_file import GgufFile  # noqa: E402
from aivillage.protocols.errors import RequestError  # noqa: E402
from tests.unit.models import tiny_gguf  # noqa: E402


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf.write(path, tiny_gguf.Q8_0)
    return path


@pytest.mark.parametrize(
    "kind", [tiny_gguf.F32, tiny_gguf.F16, tiny_gguf.Q8_0, tiny_gguf.Q4_1], ids=lambda k: k.name
)
def test_every_tensor_equals_the_reference_dequantisation(tmp_path, kind):
    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path, kind)
    file = GgufFile(path)
    reference = gguf.GGUFReader(path)
    assert len(file.tensors) == len(reference.tensors)
    for tensor in reference.tensors:
        wanted = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        mine = gguf_model.dequantize(file, file.tensor(tensor.name))
        assert torch.equal(mine, wanted.reshape(mine.shape)), tensor.name


def test_the_row_permutation_is_undone():
    """Forward rule as llama.cpp's converter writes it (`LlamaModel.permute`)."""
    weight = torch.randn(48, 8)
    heads = 3
    stored = weight.reshape(heads, 2, 8, 8).swapaxes(1, 2).reshape(48, 8)
    assert not torch.equal(stored, weight)
    assert torch.equal(gguf_model.unpermute(stored, heads), weight)


def test_a_tensor_type_that_is_not_read_is_refused(tmp_path):
    tiny_gguf.write(tmp_path / "x", gguf.GGMLQuantizationType.Q5_0)
    with pytest.raises(RequestError, match="F32, F16, Q8_0 and Q4_1"):
        gguf_model.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"architecture": "mamba"}, "mamba"),
        ({"attention.head_count": 3}, "do not fit"),
        ({"attention.head_count": 0}, "do not fit"),
        ({"feed_forward_length": 128}, "shape"),
        ({"block_count": 3}, "no tensor called blk.2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, fields, why):
    tiny_gguf.write(tmp_path / "x", **fields)
    with pytest.raises(RequestError, match=why):
        list(gguf_model.load(tmp_path / "x").layers)


def test_a_file_cut_anywhere_is_refused(whole, tmp_path):
    raw = whole.read_bytes()
    cuts = [0, 1, 3, 4, 7, 23, *range(24, 6_000, 131), len(raw) // 2, len(raw) - 40]
    for cut in cuts:
        (tmp_path / "cut").write_bytes(raw[:cut])
        with pytest.raises(RequestError, match="GGUF"):
            list(gguf_model.load(tmp_path / "cut").layers)


@pytest.mark.parametrize("count", [2**63, 2**40])
def test_a_boast_of_many_items_builds_nothing(tmp_path, count):
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    for body in (
        b"GGUF" + struct.pack("<IQQ", 3, count, 1),
        b"GGUF" + struct.pack("<IQQ", 3, 1, count),
        head + struct.pack("<Q", count),
        head + struct.pack("<Q1sIIQ", 1, b"a", 9, 4, count),
        head + struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 1) * 200,  # arrays of arrays
    ):
        (tmp_path / "x").write_bytes(body + bytes(64))
        with pytest.raises(RequestError, match="no whole GGUF"):
            GgufFile(tmp_path / "x")


def test_a_damaged_byte_is_never_an_untyped_error(whole, tmp_path):
    raw = bytearray(whole.read_bytes())
    refused = 0
    for at in range(0, 2_000, 7):
        damaged = bytearray(raw)
        damaged[at] ^= 0xFF
        (tmp_path / "x").write_bytes(damaged)
        try:
            list(gguf_model.load(tmp_path / "x").layers)
        except RequestError:
            refused += 1
    assert refused > 50


def test_loading_warns_of_nothing(whole):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(gguf_model.load(whole).layers)) == tiny_gguf.LAYERS
