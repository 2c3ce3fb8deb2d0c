"""The self-test at load: passes where rows do not know their neighbours, and only there."""

import pytest

pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

from aivillage.models.inference import gguf_model, llama, sameness  # noqa: E402
from aivillage.models.inference.linear import ROW_SIZES, linear, padded_rows  # noqa: E402
from tests.unit.models import tiny_gguf  # noqa: E402

CONTEXT = 512


def probe(tmp_path, seed_path="tiny.gguf"):
    tiny_gguf.write(tmp_path / seed_path)
    weights = gguf_model.load(tmp_path / seed_path)
    model = llama.Llama(weights, slots=8, context_tokens=CONTEXT)
    return sameness.probe(model, slots=8, context_tokens=CONTEXT)


def test_the_digest_names_the_bits(tmp_path):
    first, second = probe(tmp_path), probe(tmp_path)
    assert first == second
    assert len(first.digest) == 8


def test_a_product_that_sees_its_batch_is_found_out(tmp_path, monkeypatch):
    def company_minded(weight):
        return lambda rows: linear(weight)(rows) + 1e-6 * len(rows)

    honest = probe(tmp_path)
    monkeypatch.setattr(llama, "linear", company_minded)
    assert not probe(tmp_path).passed
    assert probe(tmp_path).digest != honest.digest


def test_attention_that_sees_its_slice_is_found_out(tmp_path, monkeypatch):
    attend = llama.attend
    monkeypatch.setattr(llama, "attend", lambda q, k, v, m: attend(q, k, v, m) + 1e-6 * len(q))
    assert not probe(tmp_path).passed


def test_a_product_is_the_product():
    weight, rows = torch.randn(48, 32), torch.randn(8, 32)
    assert torch.allclose(linear(weight)(rows), rows @ weight.T, atol=1e-5)


def test_rows_are_padded_to_the_next_size():
    assert [padded_rows(n) for n in (1, 4, 5, 33, 40)] == [4, 4, 8, 40, 40]
    assert padded_rows(ROW_SIZES[-1]) == ROW_SIZES[-1]


def test_attention_is_causal_softmax_attention():
    """Against the plain formula, head by head, for rows at the end of 6 keys."""
    rows, heads, key_heads, width, keys = 2, 4, 2, 8, 6
    query = torch.randn(rows, heads, width)
    key, value = torch.randn(key_heads, keys, width), torch.randn(key_heads, keys, width)
    hidden = torch.zeros(rows, keys)
    hidden[0, 5] = -torch.inf
    got = llama.attend(query, key, value, hidden.repeat_interleave(2, dim=0))
    for row in range(rows):
        for head in range(heads):
            scores = key[head // 2] @ query[row, head] + hidden[row]
            wanted = torch.softmax(scores, 0) @ value[head // 2]
            mine = got[row, head * width : (head + 1) * width]
            assert torch.allclose(mine, wanted, atol=1e-5)
