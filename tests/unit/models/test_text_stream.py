"""Text comes out whole, and never holds a stop string."""

from hypothesis import given
from hypothesis import strategies as st

from aivillage.models.inference.text_stream import TextStream


def said(pieces, stops=()):
    """What each piece released, and the flush."""
    stream = TextStream(lambda token: pieces[token], stops)
    given_out = []
    for token in range(len(pieces)):
        given_out.append(stream.push(token))
        if stream.stopped:
            break
    return given_out, stream.flush(), stream.stopped


def test_a_split_character_waits_for_its_end():
    snow = "☃".encode()
    assert said([b"a" + snow[:1], snow[1:2], snow[2:] + b"b"]) == (["a", "", "☃b"], "", False)


def test_an_unfinished_character_becomes_a_replacement_at_the_end():
    assert said(["☃".encode()[:2]]) == ([""], "�", False)


def test_a_stop_string_across_tokens_is_cut_and_never_shown():
    assert said([b"one EN", b"D", b" two"], ["END"]) == (["one ", ""], "", True)


def test_what_only_began_like_a_stop_string_comes_out_after_all():
    assert said([b"one EN", b"TRY"], ["END"]) == (["one ", "ENTRY"], "", False)
    assert said([b"one EN"], ["END"]) == (["one "], "EN", False)


def test_the_first_of_two_stop_strings_cuts():
    assert said([b"a.b\n"], ["\n", "."]) == (["a"], "", True)


@given(st.lists(st.binary(max_size=5), max_size=12))
def test_the_pieces_together_are_the_whole_text(pieces):
    released, rest, _ = said(pieces)
    assert "".join(released) + rest == b"".join(pieces).decode(errors="replace")


@given(st.lists(st.text("ab", max_size=3), max_size=8), st.text("ab", min_size=1, max_size=3))
def test_no_released_text_holds_the_stop_string(pieces, stop):
    released, rest, stopped = said([piece.encode() for piece in pieces], [stop])
    assert stop not in "".join(released)
    assert stopped == (stop in "".join(pieces))
    assert stopped or "".join(released) + rest == "".join(pieces)
