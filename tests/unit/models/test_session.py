"""A session without its model: allowance, reports and replay."""

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from aivillage.models.inference.generate import GenerateRequest, usage  # noqa: E402
from aivillage.models.inference.session import Session  # noqa: E402
from aivillage.models.inference.tokenizer import Prompt  # noqa: E402
from aivillage.protocols.errors import RequestError  # noqa: E402

END = 9


class Letters:
    """Token n says the n-th letter."""

    end_token_ids = frozenset((END,))

    def token_bytes(self, token):
        return b"" if token == END else bytes([ord("a") + token])


def made(answer, byte_counts, delivered=(), **fields):
    """A session and the step that makes it draw `answer` in turn."""
    read = [sum(byte_counts[: n + 1]) for n in range(len(byte_counts))]
    prompt = Prompt(tuple(range(len(byte_counts))), tuple(read))
    request = GenerateRequest(prompt="x" * max(1, read[-1]), **{"max_tokens": 4} | fields)
    session = Session(1, 0, request, prompt, Letters())
    session.replay(delivered)

    def step(rows_max=33):
        span = None if session.finished else session.next_span(rows_max)
        if span is None and not session.has_news:
            return None
        if span is not None:
            session.read(len(span.token_ids))
            if session.draws_next:
                logits = torch.zeros(10)
                logits[answer[session.output_tokens]] = 1.0
                session.draw(logits)
        return session.report()

    return session, step


def drained(step, rows_max=33):
    frames = []
    while frame := step(rows_max):
        frames.append(frame)
        if frame.finished:
            break
    return frames


@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=12),
    st.lists(st.integers(1, 60), min_size=1, max_size=10),
    st.integers(1, 33),
)
def test_no_more_is_reported_than_was_allowed_and_all_of_it_in_the_end(counts, raises, rows_max):
    session, step = made((0, 1, 2, 3), counts)
    ids, text, read = [], "", 0
    for allowed in [*sorted(raises), 1_000]:
        session.allow(allowed)
        for frame in drained(step, rows_max):
            ids += frame.token_ids
            text += frame.text
            assert frame.read_bytes >= read
            read = frame.read_bytes
            assert sum(usage(read, len(ids)).values()) <= allowed
    assert (ids, text, read, session.finished) == ([0, 1, 2, 3], "abcd", sum(counts), "length")


def test_a_small_allowance_reads_a_token_of_many_bytes_bit_by_bit():
    session, step = made((0, 1, 2, 3), [0, 64, 0])
    for allowed in range(1, 17):
        session.allow(allowed)
        assert [frame.read_bytes for frame in drained(step)][-1] == 4 * allowed


def test_an_allowance_never_shrinks():
    session, step = made((0, 1, 2, 3), [0, 4, 0])
    session.allow(3)
    session.allow(1)
    assert sum(len(frame.token_ids) for frame in drained(step)) == 2


def test_a_span_never_crosses_a_key_border():
    session, _ = made((0,), [1] * 300)
    session.allow(1_000)
    starts = []
    while (span := session.next_span(33)).position + len(span.token_ids) < 300:
        starts.append((span.position, len(span.token_ids)))
        session.read(len(span.token_ids))
    assert (231, 25) in starts
    assert all(at // 256 == (at + count - 1) // 256 for at, count in starts)


@pytest.mark.parametrize(
    ("answer", "fields", "finished", "text"),
    [
        ((0, END), {}, "eos", "a"),
        ((0, 1, 2), {"stop": ("bc",)}, "stop", "a"),
        ((0, 1, 2, 3), {"stop": ("d!",)}, "length", "abcd"),
        ((0, 1, 2, END), {}, "eos", "abc"),
    ],
)
def test_an_answer_ends_for_one_reason(answer, fields, finished, text):
    session, step = made(answer, [0, 4], **fields)
    session.allow(100)
    frames = drained(step)
    assert frames[-1].finished == finished
    assert "".join(frame.text for frame in frames) == text


def test_a_replay_goes_on_where_it_was():
    session, step = made((0, 1, 2, 3), [0, 4], delivered=(0, 1))
    session.allow(100)
    frames = drained(step)
    assert [token for frame in frames for token in frame.token_ids] == [2, 3]
    assert "".join(frame.text for frame in frames) == "cd"
    assert frames[0].read_bytes == 4


def test_a_replay_beyond_the_end_is_refused():
    with pytest.raises(RequestError, match="after the end"):
        made((0,), [0, 4], delivered=(END, 1))


def test_a_model_that_computes_no_number_ends_its_session_only():
    session, _ = made((0,), [0, 4])
    session.allow(100)
    session.read(2)
    session.draw(torch.full((10,), torch.nan))
    frame = session.report()
    assert (frame.finished, frame.token_ids) == ("error", ())
    assert "no number" in frame.error
