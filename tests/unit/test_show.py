"""What a person sees: nothing that a peer wrote moves the cursor, and a receipt reads as said."""

import argparse

import pytest

from aivillage.cli import jobs, main, show
from aivillage.protocols import messages
from aivillage.protocols.errors import JobError

WILD = "a\x1b[2J\x1b]0;owned\x07b\x9bc\r\x7f\u202edc\x00\ud800"
TAME = "a\ufffd[2J\ufffd]0;owned\ufffdb\ufffdc\ufffd\ufffd\ufffddc\ufffd\ufffd"


def test_what_a_terminal_would_obey_is_shown_as_a_mark():
    assert show.plain(WILD) == TAME
    assert show.plain("two\nlines\tand é 中 🙂") == "two\nlines\tand é 中 🙂"
    assert show.one_line("two\nlines") == "two lines"


@pytest.mark.parametrize(
    "say",
    [
        lambda: show.note(WILD),
        lambda: show.table([(WILD, 1)], ("text", "n")),
        lambda: show.pairs({"text": WILD, "map": {"x": 1}}),
        lambda: show.as_json({"text": WILD}),
        lambda: jobs._show_frame(messages.Text(id=1, text=WILD)),
        lambda: jobs._show_frame(messages.Progress(id=1, done=1, note=WILD)),
        lambda: main._report(JobError(WILD, next_step=WILD), as_json=False),
        lambda: main._report(JobError(WILD, next_step=WILD), as_json=True),
        lambda: jobs._list(
            argparse.Namespace(json=False),
            [{"job": "ab", "operation": "x", "state": "failed", "created_unix": 1, "receipt": None,
              "message": WILD}],
        ),
    ],
)  # fmt: skip
def test_no_escape_sequence_of_a_peer_reaches_the_terminal(capsys, say):
    say()
    shown = "".join(capsys.readouterr())
    assert "owned" in shown
    assert not set(shown) & set("\x1b\x07\x9b\r\x7f\u202e\x00")


def receipt(**usage):
    return jobs.receipt_line(
        {"sellers": ["x" * 52], "usage": usage, "seconds": 1.25, "price_micro_credits": 10,
         "why": "the only one", "identical": "guaranteed"}
    )  # fmt: skip


def test_a_receipt_counts_as_a_person_does():
    assert ": 1 call in 1.2 s for 0.00001 credits;" in receipt(calls=1, parts=0)
    assert ": 2 calls, 1 part in" in receipt(calls=2, parts=1)
    assert ": 12 prompt quads, 1 output token in" in receipt(prompt_quads=12, output_tokens=1)
    assert ": nothing in" in receipt(calls=0)
