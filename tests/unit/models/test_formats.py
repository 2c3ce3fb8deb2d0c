"""Formats without a model: what may be asked, what it costs at worst, and what matches."""

import json
import resource

import msgspec
import pytest

from aivillage.models.inference.formats import (
    CHOICE_CHARACTERS_MAX,
    CHOICES_MAX,
    FORMAT_BYTES_MAX,
    Format,
)
from aivillage.models.inference.generate import MODULE, GenerateRequest, GenerateResult
from aivillage.protocols.codec import unpack
from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.ports import Machine

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def asked(**fields):
    """A format as it comes off the wire."""
    return unpack(Format, msgspec.msgpack.encode(fields))


def test_a_request_that_asks_for_nothing_new_is_the_one_that_older_sellers_know():
    body = msgspec.msgpack.decode(msgspec.msgpack.encode(GenerateRequest(prompt="a")))
    assert body == {"prompt": "a"}


@pytest.mark.parametrize(
    "fields",
    [
        {"choice": ["x" * CHOICE_CHARACTERS_MAX]},
        {"choice": [str(n) for n in range(CHOICES_MAX)]},
        {"regex": "a" * FORMAT_BYTES_MAX},
        {"schema": {"enum": ["a" * (FORMAT_BYTES_MAX - len('{"enum":[""]}'))]}},
        {"schema": json.dumps(PERSON)},
        {"schema": {"properties": {"multipleOf": {"type": "string"}}}},
        {"lark": 'start: "<p>" /[<~%]+/ "max_tokens=3" // stop = <x>\n%ignore / +/'},
        {"lark": "start: a~2..3\na: /x/"},
    ],
)
def test_a_format_at_its_bounds_passes(fields):
    assert asked(**fields)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "one of"),
        ({"choice": ["a"], "regex": "a"}, "one of"),
        ({"choice": ["a", "a"]}, "twice"),
        ({"choice": [""]}, "length"),
        ({"choice": ["x" * (CHOICE_CHARACTERS_MAX + 1)]}, "length"),
        ({"choice": [str(n) for n in range(CHOICES_MAX + 1)]}, "length"),
        ({"choice": ["x" * 512] * 3 + [str(n) * 200 for n in range(99)]}, "twice|bytes"),
        ({"regex": "a" * (FORMAT_BYTES_MAX + 1)}, "length"),
        ({"regex": "☃" * 6_000}, "bytes"),
        ({"schema": {"enum": ["a" * (FORMAT_BYTES_MAX - len('{"enum":[""]}') + 1)]}}, "bytes"),
        ({"schema": "[1]"}, "no JSON object"),
        ({"schema": '{"a": '}, "no JSON object"),
        ({"schema": '{"a":' * 2_000 + "1" + "}" * 2_000}, "no JSON object"),
        ({"schema": {"items": [{"multipleOf": 1234567}]}}, "multipleOf"),
        ({"schema": '{"multiple\\u004ff": 7}'}, "multipleOf"),
        ({"lark": "start: <|im_end|>"}, "special tokens"),
        ({"lark": "start: <[5]>"}, "special tokens"),
        ({"lark": "start: a\na[max_tokens=3]: /x/"}, "max_tokens"),
        ({"lark": 'start: a\na[stop="b"]: /x/'}, "stop"),
        ({"lark": "start: X\nX: ~/abc/"}, "not"),
        ({"lark": 'start: %json {"multipleOf": 1234567}'}, "%json"),
        ({"lark": 'start: "a" // " %json'}, "%json"),
        ({"lark": "%declare X\nstart: X"}, "%ignore and %import"),
        ({"other": 1}, "unknown field"),
    ],
)
def test_a_format_out_of_bounds_is_refused_at_once(fields, why):
    with pytest.raises(RequestError, match=why):
        asked(**fields)


def test_a_format_and_stop_strings_exclude_each_other():
    with pytest.raises(RequestError, match="leave out stop"):
        unpack(
            GenerateRequest,
            msgspec.msgpack.encode({"prompt": "a", "stop": ["b"], "format": {"choice": ["c"]}}),
        )


pytest.importorskip("llguidance")

from aivillage.models.inference import grammar  # noqa: E402

MATCHES = [
    (Format(choice=("yes", "no", "nothing", 'é"\n')), ("yes", "no", 'é"\n'), ("ye", "noth", "x")),
    (Format(schema=PERSON), ('{"name": "Al", "age": 3}',), ('{"name":"Al","age":3}', "{}")),
    (Format(schema=PERSON), (), ('{"name": "Al", "age": -3}', '{"age": 3, "name": "Al"}')),
    (Format(schema='{"enum": ["☃", 2]}'), ('"☃"', "2"), ("☃", '"2"', "")),
    (Format(regex="[a-z]+-[0-9]{2}"), ("ab-12",), ("ab-1", "ab-123", "AB-12", "")),
    (Format(regex="a/b|☃"), ("a/b", "☃"), ("a", "\\", "")),
    (
        Format(lark='start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]+/'),
        ("1", "1+22+3"),
        ("1+", "+1", "a"),
    ),
]


@pytest.mark.parametrize(("wanted", "right", "wrong"), MATCHES)
def test_an_answer_is_held_against_its_format(wanted, right, wrong):
    for answer in right:
        assert grammar.fault(wanted, answer.encode(), whole=True) == "", answer
        for end in range(len(answer.encode())):
            assert grammar.fault(wanted, answer.encode()[:end], whole=False) == ""
    for answer in wrong:
        assert "answer" in grammar.fault(wanted, answer.encode(), whole=True), answer
    assert grammar.fault(wanted, b"!", whole=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "(a"},
        {"regex": "(?=a)b"},
        {"regex": r"(a)\1"},
        {"schema": {"not": {}}},
        {"schema": {"enum": []}},
        {"schema": {"type": "nonsense"}},
        {"schema": {"$ref": "#"}},
        {"schema": {"x-guidance": {"lenient": True}, "not": {}}},
        {"lark": "start: a\na: a"},
        {"lark": "nostart: /a/"},
        {"lark": "start: " + "(" * 3_000 + '"a"' + ")" * 3_000},
    ],
)
def test_what_cannot_be_compiled_is_a_typed_refusal(fields):
    with pytest.raises(RequestError, match="the format cannot be taken"):
        grammar.require_compiles(Format(**fields))


def _small(n):
    return {"type": "object", "properties": {f"p{n}_{m}": {"type": "integer"} for m in range(4)}}


HOSTILE = {
    "nested repeats": {"regex": "(((a{0,100}){0,100}){0,100}){0,100}"},
    "many optionals": {"regex": "(?:a?){5000}a{5000}"},
    "far behind": {"regex": "(.*a.{18}){5}"},
    "unicode": {"regex": r"[\p{L}\p{N}\p{S}\p{P}]{1,2000}(?i:[a-z]{1,500}k){5}"},
    "and": {"lark": "start: X\nX: " + " & ".join(f"/(.*{c}.{{12}})/" for c in "abcd")},
    "ambiguous": {"lark": 'start: e\ne: e e | e e e | "a" | "aa" | /a+/ | ""'},
    "repeated rules": {"lark": 'start: a{1,300}\na: b{1,300}\nb: c{1,300}\nc: "x" | "y" | ""'},
    "rules that double": {
        "lark": "start: r0\n"
        + "\n".join(f"r{n}: r{n + 1} r{n + 1} | r{n + 1}" for n in range(300))
        + '\nr300: "a" | ""'
    },
    "endless": {"lark": 'start: a\na: "x" a'},
    "properties": {"schema": {"type": "object", "properties": {f"p{n}": {} for n in range(900)}}},
    "objects": {"schema": {"enum": [{"a": n, "b": [n] * 3} for n in range(500)]}},
    "products": {"schema": {"allOf": [{"anyOf": [_small(n)] * 4} for n in range(8)]}},
    "references": {
        "schema": {
            "$defs": {
                f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(60)
            } | {"d60": {"type": "string"}},
            "$ref": "#/$defs/d0",
        }
    },
    "patterns": {"schema": {"type": "string", "pattern": "^(.*a.{15}){3}$", "minLength": 10**9}},
    "disjoint": {
        "schema": {
            "type": "object",
            "patternProperties": {"^(.*a.{14})$": {}, "^(.*b.{15})$": {}},
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_format_takes_neither_the_worker_nor_its_memory(name):
    """CPU time, not wall time; the bound is what eight such sessions may cost a step together."""
    begun, most = _used()
    try:
        looked = grammar.matcher(Format(**HOSTILE[name]), grammar._bytes())
        for _ in range(30):
            allowed = [n for n, ok in enumerate(looked.compute_logit_bias()) if ok]
            if looked.is_error() or looked.is_stopped() or not allowed:
                break
            looked.consume_token(allowed[-1])
    except RequestError as error:
        assert "cannot be taken" in error.message
    seconds, memory = (now - before for now, before in zip(_used(), (begun, most), strict=True))
    assert seconds < 3
    assert memory < 200 << 10


def _used():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_maxrss


ANSWERED = GenerateResult(text="yes", token_ids=(5, 6), finish_reason="eos", prompt_bytes=5)


@pytest.mark.parametrize(
    ("wanted", "text", "finish_reason", "why"),
    [
        (Format(choice=("yes", "no")), "yes", "eos", ""),
        (Format(choice=("yes", "no")), "maybe", "eos", "none of the choices"),
        (Format(choice=("yes", "no")), "ye", "eos", "none of the choices"),
        (Format(choice=("yes", "no")), "ye", "length", ""),
        (Format(choice=("yes", "no")), "xe", "length", "none of the choices"),
        (Format(regex="y(e|☃)s"), "y☃s", "eos", ""),
        (Format(regex="y(e|☃)s"), "y\ufffd", "length", ""),
        (Format(regex="y(e|☃)s"), "ys", "eos", "at byte 1"),
        (Format(regex="y(e|☃)s"), "y☃", "eos", "ends before"),
        (Format(schema=PERSON), '{"name": "Al"}', "eos", "leaves its format"),
    ],
)
def test_the_check_of_a_result_holds_it_against_the_format_whoever_has_the_model(
    wanted, text, finish_reason, why
):
    request = GenerateRequest(prompt="abcde", model="none", max_tokens=2, format=wanted)
    result = msgspec.structs.replace(ANSWERED, text=text, finish_reason=finish_reason)
    verdict = MODULE.check(request, result)
    assert verdict.ok == (not why)
    assert why in verdict.reason


def test_a_machine_without_the_library_says_so_before_anything_is_bought(monkeypatch):
    def estimate(wanted):
        return MODULE.estimate(GenerateRequest(prompt="a", format=wanted), Machine())

    monkeypatch.setattr(grammar.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(RefusedError, match="llguidance") as caught:
        estimate(Format(regex="a"))
    assert caught.value.code == "NOT_OFFERED"
    assert "pip install" in caught.value.next_step
    assert estimate(Format(choice=("a",)))[0]
    assert grammar.fault(Format(choice=("a",)), b"a", whole=True) == ""


def test_where_the_library_gives_up_a_check_accuses_nobody():
    wanted = Format(lark=HOSTILE["endless"]["lark"])
    looked = grammar.fault(wanted, b"xxx", whole=False)
    assert looked == ""
