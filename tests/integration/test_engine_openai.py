"""The openai engine against a server over HTTP: answers, limits, and all that goes wrong."""

from __future__ import annotations

import pathlib
import ssl
import time

import msgspec
import pytest

from aivillage.models.inference import catalogue, chat_stream, endpoint, remote
from aivillage.models.inference.engine_openai import OpenaiEngine
from aivillage.models.inference.generate import (
    MODULE,
    ChatMessage,
    GenerateRequest,
    GenerateResult,
    prompt_bytes,
    usage,
)
from aivillage.models.library import remote_models
from aivillage.models.library.store import Library
from aivillage.protocols.errors import ConfigError, RefusedError, RequestError
from tests.integration.chat_server import ChatServer, free_port

NAME = "remote-fox"
PLENTY = 10**6
STORY = GenerateRequest(prompt="Tell me a story about a fox.", model=NAME, max_tokens=64)
KEY = "sk-a-very-secret-key-0123456789"
SECONDS_MAX = 20.0


@pytest.fixture
def server():
    with ChatServer() as found:
        yield found


def model_of(tmp_path, url, *, key=None, name=NAME):
    key_file = ""
    if key is not None:
        key_file = str(tmp_path / "key")
        pathlib.Path(key_file).touch(0o600)
        pathlib.Path(key_file).write_text(key + "\n", encoding="utf-8")
    library = Library(tmp_path / "models")
    found = endpoint.new(url=url, model="fox-7b", key_file=key_file)
    manifest = remote_models.add(library, name, found, price_micro_credits=50, context_tokens=4096)
    return catalogue.pulled(manifest, library.folder / name)


def engine_of(tmp_path, server, **more):
    return OpenaiEngine(model_of(tmp_path, server.url, **more), slots=2)


def frames_of(engine, count=1):
    """Steps until so many sessions have ended, as a worker would."""
    found, ended, until = [], 0, time.monotonic() + SECONDS_MAX
    while ended < count:
        assert time.monotonic() < until, f"no end after {found}"
        frames = engine.step()
        found += frames
        ended += sum(bool(frame.finished) for frame in frames)
        if not frames and not engine.waits:
            break
    return found


def alone(engine, request, delivered=()):
    """(ids, text, how it ended, error)."""
    engine.add(0, request, delivered)
    engine.allow(0, PLENTY)
    frames = frames_of(engine)
    ids = [*delivered, *(token for frame in frames for token in frame.token_ids)]
    return ids, "".join(f.text for f in frames), frames[-1].finished, frames[-1].error


def verdict_of(request, ids, text, end):
    result = GenerateResult(
        text=text, token_ids=tuple(ids), finish_reason=end, prompt_bytes=prompt_bytes(request)
    )
    return MODULE.check(request, result)


def test_an_answer_is_the_servers_text_and_its_payer_counts_it_again(tmp_path, server):
    engine = engine_of(tmp_path, server, key=KEY)
    ids, text, end, error = alone(engine, STORY)
    assert (text, end, error) == ("The fox met a ☃ and slept.", "eos", "")
    assert len(ids) == -(-len(text.encode()) // 3) + 1
    assert verdict_of(STORY, ids, text, end).ok
    (asked,) = server.asked
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert server.paths == ["/v1/chat/completions"]
    assert asked["model"] == "fox-7b"
    assert asked["messages"] == [{"role": "user", "content": STORY.prompt}]
    assert (asked["max_tokens"], asked["temperature"], asked["stream"]) == (64, 0.0, True)
    assert "seed" not in asked


def test_roles_and_draws_reach_the_server(tmp_path, server):
    talk = (ChatMessage(role="system", content="Be brief."), ChatMessage(content="Hello?"))
    request = GenerateRequest(
        messages=talk, model=NAME, max_tokens=5, temperature=0.5, top_p=0.9, seed=7
    )
    alone(engine_of(tmp_path, server), request)
    (asked,) = server.asked
    assert [(m["role"], m["content"]) for m in asked["messages"]] == [
        ("system", "Be brief."), ("user", "Hello?"),
    ]  # fmt: skip
    assert (asked["temperature"], asked["top_p"], asked["seed"]) == (0.5, 0.9, 7)
    assert "Authorization" not in server.headers[0]


def test_what_it_promises_is_little_and_it_says_so(tmp_path, server):
    info = engine_of(tmp_path, server).info()
    assert (info.engine, info.identical, info.rechecks) == ("openai", "best effort", False)
    assert info.kernel_class == f"openai1/{info.weights_sha256[:16]}"


def test_nobody_is_asked_before_the_prompt_and_a_token_are_paid(tmp_path, server):
    engine = engine_of(tmp_path, server)
    engine.add(0, STORY, ())
    assert engine.step() == []
    quads = usage(prompt_bytes(STORY), 0)["prompt_quads"]
    engine.allow(0, quads)
    (frame,) = engine.step()
    assert (frame.read_bytes, frame.token_ids) == (prompt_bytes(STORY), ())
    assert engine.step() == []
    assert not server.asked
    for allowed in (quads + 1, quads + 3):
        engine.allow(0, allowed)
        got = [t for f in stepped_until_still(engine) for t in f.token_ids]
        assert len(got) == allowed - quads - (0 if allowed == quads + 1 else 1)
    assert len(server.asked) == 1
    engine.cancel(0)


def stepped_until_still(engine):
    """Frames until its server is done and nothing more may be handed out."""
    found, until = [], time.monotonic() + SECONDS_MAX
    while True:
        assert time.monotonic() < until
        frames = engine.step()
        found += frames
        if not frames and not engine.waits:
            return found


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_no_more_is_sold_than_was_asked_for_and_the_server_is_hung_up_on(tmp_path, server, tokens):
    server.words, server.seconds_between = ["word "] * 2_000, 0.001
    request = msgspec.structs.replace(STORY, max_tokens=tokens)
    ids, text, end, _ = alone(engine_of(tmp_path, server), request)
    assert (len(ids), end) == (tokens, "length")
    assert verdict_of(request, ids, text, end).ok
    assert server.hung_up.acquire(timeout=SECONDS_MAX)


def test_a_server_may_count_its_tokens_otherwise(tmp_path, server):
    server.finish = "length"
    ids, text, end, _ = alone(engine_of(tmp_path, server), STORY)
    assert (text, end) == ("".join(server.words), "length")
    assert len(ids) < STORY.max_tokens
    assert verdict_of(STORY, ids, text, end).ok


@pytest.mark.parametrize("stop", ["met", "☃", "slept."])
def test_a_stop_string_ends_the_answer_before_it(tmp_path, server, stop):
    request = msgspec.structs.replace(STORY, stop=(stop, "never"))
    ids, text, end, _ = alone(engine_of(tmp_path, server), request)
    assert (text, end) == ("The fox met a ☃ and slept.".partition(stop)[0], "stop")
    assert verdict_of(request, ids, text, end).ok
    assert "stop" not in server.asked[0], "the server would swallow the text that ended it"


def test_two_sessions_do_not_mix_and_a_third_finds_no_slot(tmp_path, server):
    engine = engine_of(tmp_path, server)
    for number in (0, 1):
        engine.add(number, STORY, ())
        engine.allow(number, PLENTY)
    with pytest.raises(RefusedError) as caught:
        engine.add(2, STORY, ())
    assert caught.value.code == "BUSY"
    frames = frames_of(engine, 2)
    for number in (0, 1):
        text = "".join(frame.text for frame in frames if frame.session == number)
        assert text == "".join(server.words)
    assert not engine.waits


def test_cancel_hangs_up_and_frees_the_slot_at_once(tmp_path, server):
    server.hang_after = 2
    engine = engine_of(tmp_path, server)
    for number in (0, 1):
        engine.add(number, STORY, ())
        engine.allow(number, PLENTY)
    said = set()
    while said != {0, 1}:
        said |= {frame.session for frame in engine.step() if frame.token_ids}
    engine.cancel(0)
    engine.add(0, STORY, ())
    assert server.hung_up.acquire(timeout=SECONDS_MAX)
    engine.cancel(0)
    engine.cancel(1)
    engine.cancel(99)
    assert server.hung_up.acquire(timeout=SECONDS_MAX)
    assert engine.step() == []
    assert not engine.waits


def test_what_a_cancelled_session_hears_goes_to_nobody(tmp_path, server):
    """Its number is taken again at once, by another question."""
    server.seconds_between = 0.01
    engine = engine_of(tmp_path, server)
    engine.add(0, STORY, ())
    engine.allow(0, PLENTY)
    while not any(frame.token_ids for frame in engine.step()):
        pass
    engine.cancel(0)
    assert alone(engine, STORY)[1] == "".join(server.words)


def test_it_goes_on_where_the_server_says_the_same_again(tmp_path, server):
    engine = engine_of(tmp_path, server)
    ids, text, end, _ = alone(engine, STORY)
    for cut in (1, 4, len(ids) - 2):
        again, rest, end_again, error = alone(engine, STORY, ids[:cut])
        assert (again, end_again, error) == (ids, end, "")
        assert text.endswith(rest)


@pytest.mark.parametrize("words", [["The ", "dog ", "barked."], ["The"]])
def test_it_does_not_go_on_where_the_server_says_something_else(tmp_path, server, words):
    engine = engine_of(tmp_path, server)
    ids = alone(engine, STORY)[0]
    server.words = words
    again, text, end, error = alone(engine, STORY, ids[:4])
    assert (again, text, end) == (ids[:4], "", "error")
    assert "answers otherwise" in error


@pytest.mark.parametrize("delivered", [(0,), (0x5468, 0x656667), (1 << 24,), (5,)])
def test_what_is_no_beginning_of_an_answer_is_refused(tmp_path, server, delivered):
    engine = engine_of(tmp_path, server)
    with pytest.raises(RequestError):
        engine.add(0, STORY, delivered)
    with pytest.raises(RequestError, match="answers requests to"):
        engine.add(0, msgspec.structs.replace(STORY, model="remote-other"), ())
    assert not server.asked


# --------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(("status", "why"), [(401, "the key"), (429, "too much"), (500, "answer")])
def test_a_refusal_is_told_by_its_number_and_never_in_the_servers_words(
    tmp_path, server, status, why
):
    server.status, server.body_of_refusal = status, f"Incorrect API key: {KEY}".encode()
    ids, _, end, error = alone(engine_of(tmp_path, server, key=KEY), STORY)
    assert (ids, end) == ([], "error")
    assert str(status) in error
    assert why in error
    assert KEY not in error


def test_a_redirect_is_not_followed(tmp_path, server):
    def elsewhere(request):
        request.send_response(307)
        request.send_header("Location", "http://127.0.0.1:1/v1/chat/completions")
        request.end_headers()

    server.write = elsewhere
    assert "307" in alone(engine_of(tmp_path, server, key=KEY), STORY)[3]


def test_a_server_that_dies_midway_leaves_what_it_said(tmp_path, server):
    server.cut_after = 3
    ids, text, end, error = alone(engine_of(tmp_path, server), STORY)
    assert (text, end) == ("The fox met "[:12], "error")
    assert len(ids) == 4
    assert "hung up" in error


def test_a_server_that_hangs_is_given_up(tmp_path, server, monkeypatch):
    monkeypatch.setattr(chat_stream, "SILENCE_SECONDS_MAX", 0.2)
    server.hang_after = 3
    _, text, end, error = alone(engine_of(tmp_path, server), STORY)
    assert (text, end) == ("The fox met ", "error")
    assert "fell silent" in error


def test_nobody_there_is_typed(tmp_path):
    model = model_of(tmp_path, f"http://127.0.0.1:{free_port()}/v1")
    assert "cannot be used" in alone(OpenaiEngine(model), STORY)[3]


def raw(body, kind="text/event-stream"):
    def write(request):
        request.send_response(200)
        request.send_header("Content-Type", kind)
        request.end_headers()
        try:
            request.wfile.write(body)
        except OSError:
            return

    return write


def ended(reason):
    return b'data: {"choices": [{"finish_reason": "%s"}]}\n\ndata: [DONE]\n\n' % reason.encode()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"data: {\n\n", "no chunk"),
        (b"data: [1, 2]\n\n", "no chunk"),
        (b"data: " + b"[" * 5_000 + b"\n\n", "no chunk"),
        (b"data: {\"choices\": [{\"delta\": {\"content\": 7}}]}\n\n", "no chunk"),
        (b"data: \xff\xfe\n\n", "no chunk"),
        (b'data: {"choices": [{"delta": {"content": "\\ud800"}}]}\n\n', "no chunk"),
        (b"<html>no\n", "hung up"),
        (b"", "hung up"),
        (b"data: {\"error\": {\"message\": \"boom " + KEY.encode() + b"\"}}\n\n", "an error"),
        (b"data: [DONE]\n\n", "without a reason"),
        (ended("content_filter"), "reason of its own"),
        (ended("length"), "said nothing"),
    ],
)  # fmt: skip
def test_garbage_is_an_error_of_the_servers(tmp_path, server, body, why):
    server.write = raw(body)
    ids, _, end, error = alone(engine_of(tmp_path, server, key=KEY), STORY)
    assert (ids, end) == ([], "error")
    assert why in error
    assert KEY not in error


def test_what_is_no_http_and_what_does_not_stream_is_an_error(tmp_path, server):
    engine = engine_of(tmp_path, server)
    server.write = lambda request: request.wfile.write(b"\x00\xff not http\r\n\r\n")
    assert "cannot be used" in alone(engine, STORY)[3]
    server.write = raw(b'{"choices": []}', "application/json")
    assert "does not stream" in alone(engine, STORY)[3]


@pytest.mark.parametrize(("extra", "fits"), [(0, True), (1, False)])
def test_a_line_has_a_limit(tmp_path, server, monkeypatch, extra, fits):
    head, tail = b'data: {"choices": [{"delta": {"content": "', b'"}, "finish_reason": "stop"}]}\n'
    room = 4_096 - len(head) - len(tail)
    monkeypatch.setattr(chat_stream, "LINE_BYTES_MAX", 4_096)
    server.write = raw(head + b"x" * (room + extra) + tail + b"\ndata: [DONE]\n\n")
    request = msgspec.structs.replace(STORY, max_tokens=2_048)
    _, text, _, error = alone(engine_of(tmp_path, server), request)
    assert (len(text) == room, "more than an answer" in error) == (fits, not fits)


@pytest.mark.parametrize(("limit", "fits"), [(1_014, True), (1_013, False)])
def test_a_stream_has_a_limit(tmp_path, server, monkeypatch, limit, fits):
    monkeypatch.setattr(chat_stream, "STREAM_BYTES_MAX", limit)
    end = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}\n'
    done = b"data: [DONE]\n"
    server.write = raw(b":" * (1_013 - len(end) - len(done)) + b"\n" + end + done)
    error = alone(engine_of(tmp_path, server), STORY)[3]
    assert ("more than an answer" in error, error == "") == (not fits, fits)


def test_odd_text_is_sold_as_text(tmp_path, server):
    server.words = ["nul \0 ", "☃" * 3, ""]
    ids, text, end, _ = alone(engine_of(tmp_path, server), STORY)
    assert text == "nul \ufffd ☃☃☃"
    assert verdict_of(STORY, ids, text, end).ok


def test_a_certificate_that_nobody_vouches_for_is_not_talked_to(tmp_path):
    from tests.integration.own_certificate import certificate

    with ChatServer() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        path = certificate(tmp_path, "127.0.0.1")
        context.load_cert_chain(path)
        server.encrypt(context)
        engine = OpenaiEngine(model_of(tmp_path, server.url, key=KEY))
        assert "certificate" in alone(engine, STORY)[3]
        assert not server.asked
        engine._tls.load_verify_locations(path)
        assert alone(engine, STORY)[1] == "".join(server.words)
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


# --------------------------------------------------------------------------- the key, the URL


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_can_reach_is_not_used(tmp_path, server, mode):
    model = model_of(tmp_path, server.url, key=KEY)
    (tmp_path / "key").chmod(mode)
    with pytest.raises(ConfigError, match="others can read") as caught:
        OpenaiEngine(model)
    assert "chmod 600" in caught.value.next_step


@pytest.mark.parametrize("body", ["", "two words", "x" * 4_097, "ümlaut", "a\nb"])
def test_what_is_no_key_is_said_without_showing_it(tmp_path, server, body):
    with pytest.raises(ConfigError, match="holds no key") as caught:
        model_of(tmp_path, server.url, key=body)
    assert not body or body not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/v1", "host:80/v1", "http://", "https://user:secret@host/v1",
        "https://host/v1?key=secret", "https://host/v1#x", "https://host:99999/v1",
        "https://host/v 1", "https://host/v1\r\nX: y",
    ],
)  # fmt: skip
def test_a_url_that_is_more_than_a_place_is_refused(url):
    with pytest.raises(RequestError, match="cannot be asked") as caught:
        endpoint.new(url=url, model="m")
    assert "secret" not in str(caught.value) or "?" in url


def test_a_key_does_not_cross_the_network_in_the_clear():
    endpoint.new(url="http://10.1.2.3/v1", model="m")
    for host in ("127.0.0.1", "[::1]", "localhost"):
        endpoint.new(url=f"http://{host}:8000/v1", model="m", key_file="k")
    with pytest.raises(RequestError, match="for all to read"):
        endpoint.new(url="http://10.1.2.3/v1", model="m", key_file="k")


def test_an_endpoint_that_was_changed_is_not_asked(tmp_path, server):
    model = model_of(tmp_path, server.url)
    path = tmp_path / "models" / NAME / "endpoint.json"
    path.write_bytes(path.read_bytes().replace(b"fox-7b", b"cat-7b"))
    with pytest.raises(ConfigError, match="changed"):
        OpenaiEngine(model)


def test_the_same_place_has_another_digest_elsewhere(tmp_path, server):
    one = model_of(tmp_path / "a", server.url)
    other = model_of(tmp_path / "b", server.url)
    assert one.sha256 != other.sha256


def test_tokens_are_read_back_as_the_bytes_they_were():
    pieces = remote.Pieces()
    text = "aé☃😀".encode() * 3
    tokens = [t for at in range(0, len(text), 5) for t in pieces.push(text[at : at + 5])]
    tokens += pieces.flush()
    assert b"".join(map(remote.token_bytes, tokens)) == text
    assert all(map(remote.is_full, tokens[:-1]))
    assert max(tokens) < remote.VOCABULARY


@pytest.mark.parametrize(
    ("ids", "end", "text", "why"),
    [
        ((0x616263, 0x64), "length", "abcd", ""),
        ((0x6162, 0x6364), "length", "abcd", "short"),
        ((0x616263, 0x64, 0), "eos", "abcd", ""),
        ((0x616263, 0x64), "eos", "abcd", "end token"),
        ((0, 0x616263), "length", "abc", "short"),
        ((0x616263, 0), "length", "abc", "end token"),
        ((0x616263,), "length", "abd", "not what the tokens say"),
        ((1 << 24,), "length", "", "vocabulary"),
        ((), "length", "", "0 tokens"),
    ],
)
def test_what_a_seller_may_not_say_of_a_remote_answer(ids, end, text, why):
    request = GenerateRequest(prompt="x", model=NAME, max_tokens=4)
    verdict = verdict_of(request, ids, text, end)
    assert (verdict.ok, why in verdict.reason) == (not why, True)
    named = msgspec.structs.replace(request, model="fox")
    if end == "length" and not why:
        assert not verdict_of(named, ids, text, end).ok, "other models' ends are as before"


def test_the_module_itself_streams_a_remote_model(tmp_path, server, monkeypatch):
    class Context:
        delivered = ()
        deadline_seconds, seed, scratch = 10.0, 0, ""

        def cancelled(self):
            return False

    from aivillage.models.inference import engine_choice

    engine = engine_of(tmp_path, server)
    monkeypatch.setattr(engine_choice, "shared_engine", lambda _model: engine)
    *_, last = MODULE.run(STORY, Context())
    assert msgspec.msgpack.decode(last.body, type=GenerateResult).text == "".join(server.words)
