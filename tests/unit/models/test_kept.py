"""What a session may go on from: the slots alone, and an engine over a toy model.

The toy's every key depends on all keys before it in its slot and on the kernel that computed it, so
one key too many, a stale one or one of the wrong kernel changes what is drawn.
"""

import hashlib
import itertools

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from aivillage.models.inference.generate import (  # noqa: E402
    ChatMessage,
    GenerateRequest,
    prompt_bytes,
    usage,
)
from aivillage.models.inference.kept import NOTHING, Kept, Place, Slots, Wanted  # noqa: E402
from aivillage.models.inference.session_engine import SessionEngine  # noqa: E402
from aivillage.models.inference.tokenizer import Prompt  # noqa: E402
from aivillage.protocols.ports import EngineInfo  # noqa: E402
from aivillage.protocols.prefixes import PrefixTokens  # noqa: E402
from aivillage.protocols.rechecking import Claim  # noqa: E402

CONTEXT, VOCABULARY, LETTERS, PLENTY, TEMPLATE = 600, 40, 26, 10**6, 3
ANN, BOB = b"ann", b"bob"


def slots_of(*kept, drawn_as_prompt=True, keeps=True):
    slots = Slots(len(kept), keeps=keeps, drawn_as_prompt=drawn_as_prompt)
    for slot, one in enumerate(kept):
        slots.take(slot)
        slots.give_back(slot, one)
    return slots


def kept(ids, scope=ANN, prompt=None):
    return Kept(tuple(ids), len(ids) if prompt is None else prompt, scope)


def wants(ids, scope=ANN, *, prompt=None, open_tokens=0):
    return Wanted(tuple(ids), len(ids) if prompt is None else prompt, open_tokens, scope)


def test_the_longest_common_prefix_is_found_and_not_one_token_more():
    slots = slots_of(kept([1, 2, 9, 9]), kept([1, 2, 3, 4, 9]), kept([9]))
    assert slots.place(wants([1, 2, 3, 4, 5, 6])) == Place(1, 1, 4)


def test_the_last_token_is_always_read_since_it_draws():
    assert slots_of(kept([1, 2, 3])).place(wants([1, 2, 3])).tokens == 2
    assert slots_of(kept([1, 2, 3])).place(wants([1, 2, 3, 4])).tokens == 3


def test_of_equals_the_longest_unused_is_overwritten_and_an_empty_one_before_it():
    slots = slots_of(kept([1]), kept([2]), NOTHING)
    assert slots.place(wants([7, 8])).slot == 2
    slots = slots_of(kept([1]), kept([2]))
    slots.take(0)
    slots.give_back(0, kept([3]))
    assert slots.place(wants([7, 8])).slot == 1


def test_a_conversation_that_only_begins_alike_leaves_the_other_where_it_is():
    slots = slots_of(kept([1, 2, 3, 4, 5]), kept([6]))
    assert slots.place(wants([1, 2, 8, 9])) == Place(1, 0, 2)
    assert slots_of(kept([1, 2, 3, 4, 5])).place(wants([1, 2, 8, 9])) == Place(0, 0, 2)


def test_another_buyer_shares_the_template_and_nothing_that_somebody_wrote():
    slots = slots_of(kept([1, 2, 3, 4, 5]), NOTHING)
    assert slots.place(wants([1, 2, 3, 4, 5, 6], BOB, open_tokens=2)) == Place(1, 0, 2)
    assert slots.place(wants([1, 2, 3, 4, 5, 6], ANN, open_tokens=2)) == Place(0, 0, 5)
    assert slots.place(wants([1, 2, 3], b"")).tokens == 0


def test_who_asks_the_same_as_another_does_not_put_the_other_out():
    """Else the other would find its conversation gone, and know."""
    slots = slots_of(kept([1, 2, 3, 4]), kept([9, 9, 9]))
    assert slots.place(wants([1, 2, 3, 4, 5], BOB, open_tokens=3)).slot == 1


@pytest.mark.parametrize(("alike", "shared"), [(True, 5), (False, 3)])
def test_a_drawn_token_is_no_prompt_unless_its_bits_are(alike, shared):
    slots = slots_of(kept([1, 2, 3, 4, 5], prompt=3), drawn_as_prompt=alike)
    assert slots.place(wants([1, 2, 3, 4, 5, 6])).tokens == shared
    resumed = wants([1, 2, 3, 4, 5, 6], prompt=3)
    assert slots.place(resumed).tokens == 5, "drawn then and drawn now"
    assert slots.place(wants([1, 2, 3, 4, 5, 6], prompt=2)).tokens == (5 if alike else 2)


def test_an_engine_whose_bits_depend_on_company_keeps_nothing():
    assert slots_of(kept([1, 2, 3]), keeps=False).place(wants([1, 2, 3, 4])).tokens == 0


# --------------------------------------------------------------------------- an engine


class Toy:
    """A `RowModel` of hashes. `calls`: (slot, first position, count) of every span."""

    def __init__(self, slots, *, draws_as_it_reads):
        self.draws_as_it_reads = draws_as_it_reads
        self.keys = [[b""] * CONTEXT for _ in range(slots)]
        self.rows = 0

    def forward(self, spans):
        states = []
        for span in spans:
            kernel = b"one" if span.drawn and not self.draws_as_it_reads else b"many"
            keys = self.keys[span.slot]
            for at, token in enumerate(span.token_ids, span.position):
                before = b"".join(keys[:at])
                keys[at] = hashlib.blake2b(b"%d" % token + kernel + before, digest_size=4).digest()
                states.append(int.from_bytes(hashlib.sha256(b"".join(keys[: at + 1])).digest()[:3]))
                self.rows += 1
        return torch.tensor(states, dtype=torch.float32).unsqueeze(1)

    def logits(self, states):
        drawn = states[:, 0].to(torch.int64) % LETTERS
        return torch.nn.functional.one_hot(drawn, VOCABULARY).float() * 50

    def copy_slot(self, source, target, tokens):
        self.keys[target][:tokens] = self.keys[source][:tokens]


class Letters:
    """A letter is a token; the template is three marks, and one after each message."""

    end_token_ids = frozenset((VOCABULARY - 1,))

    def token_bytes(self, token):
        return bytes([ord("a") + token])

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def prompt(self, messages):
        ids, counts = [30] * TEMPLATE, [0] * TEMPLATE
        for message in messages:
            ids += [*(ord(letter) - ord("a") for letter in message.content), 31]
            counts += [*(1 for _ in message.content), 0]
        return Prompt(tuple(ids), tuple(itertools.accumulate(counts)))


def engine_of(*, alike, slots=3, identical="guaranteed"):
    info = EngineInfo(
        engine="toy", model="toy", kernel_class="toy/1", identical=identical, active_parameters=1,
        context_tokens=CONTEXT, vocabulary=VOCABULARY, weights_sha256="",
    )  # fmt: skip
    toy = Toy(slots, draws_as_it_reads=alike)
    return SessionEngine(toy, Letters(), info, slots=slots)


def asked(*contents, tokens=4, **fields):
    messages = tuple(ChatMessage(content=content) for content in contents)
    return GenerateRequest(messages=messages, model="toy", max_tokens=tokens, **fields)


def drained(engine, number, ids, marks, read):
    """Steps until nothing moves; `read` gets the bytes that session `number` reported."""
    while frames := engine.step():
        for frame in (one for one in frames if one.session == number):
            ids += frame.token_ids
            marks.append(frame.fingerprint)
            read[:] = [frame.read_bytes]


def answer(engine, request, scope=b"", delivered=(), allowances=(PLENTY,)):
    """(ids, fingerprints, what was reported after each allowance)."""
    engine.add(7, request, delivered, scope)
    ids, marks, bill = list(delivered), [], []
    read = [prompt_bytes(request) if delivered else 0]
    for units in allowances:
        engine.allow(7, units)
        drained(engine, 7, ids, marks, read)
        bill.append((read[0], len(ids)))
        assert sum(usage(read[0], len(ids)).values()) <= units or delivered
    engine.cancel(7)
    return ids, [mark for mark in marks if mark], bill


TURN = st.fixed_dictionaries(
    {
        "scope": st.sampled_from([ANN, BOB]),
        "text": st.text("ab", max_size=6),
        "goes_on": st.booleans(),
        "tokens": st.integers(1, 5),
        "delivered": st.integers(0, 4),
        "allowances": st.lists(st.integers(1, 12), max_size=4),
        "ends": st.booleans(),
        "rechecks": st.booleans(),
    }
)


@settings(deadline=None, max_examples=80)
@given(st.booleans(), st.integers(1, 3), st.lists(TURN, min_size=2, max_size=8))
def test_whatever_was_kept_an_answer_has_the_bits_and_the_bill_of_a_cold_one(alike, slots, turns):
    warm = engine_of(alike=alike, slots=slots)
    said = {ANN: ["a"], BOB: ["a"]}
    for turn in turns:
        scope = turn["scope"]
        if turn["goes_on"] and sum(map(len, said[scope])) < 60:
            said[scope] += [turn["text"] or "b"]
        else:
            said[scope] = ["a" + turn["text"]]
        request = asked(*said[scope], tokens=turn["tokens"])
        whole, *_ = answer(engine_of(alike=alike, slots=1), request)
        delivered = tuple(whole[: min(turn["delivered"], len(whole) - 1)])
        allowances = [*sorted(turn["allowances"]), *([PLENTY] if turn["ends"] else [])]
        cold = answer(engine_of(alike=alike, slots=1), request, scope, delivered, allowances)
        assert answer(warm, request, scope, delivered, allowances) == cold
        if turn["ends"]:
            assert cold[0] == whole
        if turn["rechecks"]:
            assert finding(warm, request, whole).odd == ()
        said[scope] += ["".join(chr(ord("a") + token) for token in whole)]


def finding(engine, request, ids):
    engine.recheck(8, request, Claim(token_ids=tuple(ids), fingerprints=()))
    while True:
        for frame in engine.step():
            if frame.finding is not None:
                return frame.finding


@pytest.mark.parametrize("alike", [True, False])
def test_the_next_turn_reads_only_what_is_new(alike):
    engine = engine_of(alike=alike)
    first = asked("a" * 40)
    ids, *_ = answer(engine, first, ANN)
    rows, told = engine._model.rows, engine.prefix_tokens
    assert told == PrefixTokens(read=TEMPLATE + 41, reused=0)
    drawn = "".join(chr(ord("a") + token) for token in ids)
    answer(engine, asked("a" * 40, drawn, "bb"), ANN)
    found = TEMPLATE + 41
    if alike:
        found += len(ids) - 1  # the last one was drawn and not read
    prompt = TEMPLATE + 41 + len(ids) + 1 + 3
    assert engine.prefix_tokens == told + PrefixTokens(read=prompt - found, reused=found)
    assert engine._model.rows - rows == prompt - found + 3  # and what it draws


def test_a_recheck_reads_everything_and_leaves_nothing():
    engine = engine_of(alike=True, slots=1)
    request = asked("abababab")
    ids, *_ = answer(engine, request)
    damaged = engine._model.keys[0]
    damaged[:] = [b"bad!"] * CONTEXT
    before = engine._model.rows
    assert finding(engine, request, ids).odd == ()
    assert engine._model.rows - before == TEMPLATE + 9 + len(ids) - 1
    answer(engine, request)
    assert engine.prefix_tokens.reused == 0


def test_what_a_failed_session_left_is_not_gone_on_from():
    engine = engine_of(alike=True, slots=1)
    engine._model.logits = lambda states: torch.full((len(states), VOCABULARY), torch.nan)
    engine.add(7, asked("abab"), ())
    engine.allow(7, PLENTY)
    assert engine.step()[-1].finished == "error"
    del engine._model.logits
    answer(engine, asked("abab"))
    assert engine.prefix_tokens.reused == 0


def test_a_session_that_was_cancelled_before_it_read_leaves_what_it_found():
    engine = engine_of(alike=True, slots=1)
    answer(engine, asked("abababab"))
    engine.add(1, asked("abababab", "b"), ())
    engine.cancel(1)
    answer(engine, asked("abababab", "a"))
    assert engine.prefix_tokens.reused == TEMPLATE + 9


def test_kept_tokens_are_reported_only_as_the_allowance_reaches_them():
    engine = engine_of(alike=True, slots=1)
    answer(engine, asked("a" * 40))
    rows = engine._model.rows
    engine.add(7, asked("a" * 40, "b"), ())
    assert engine.step() == []
    for units in range(1, 11):
        engine.allow(7, units)
        (frame,) = engine.step()
        assert frame.read_bytes == 4 * units
    assert engine._model.rows == rows, "nothing new was read yet"
    engine.cancel(7)


def test_best_effort_keeps_nothing():
    engine = engine_of(alike=True, slots=1, identical="best effort")
    answer(engine, asked("abab"))
    answer(engine, asked("abab"))
    assert engine.prefix_tokens.reused == 0
