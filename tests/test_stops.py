"""Stop strings are found wherever tokens end, and an excluded one is never told, not even its beginning."""

from hypothesis import given
from hypothesis import strategies as st

from service.engine.stops import AnswerText

pieces_strategy = st.lists(st.text("abc", max_size=4), min_size=1, max_size=12)
stops_strategy = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3)


def first_match(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Start and end of the stop string that ends first; of several, the longest."""
    found = [(at, at + len(stop)) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    return min(found, key=lambda span: (span[1], span[0]), default=None)


@given(pieces=pieces_strategy, stops=stops_strategy, include_stop=st.booleans())
def test_the_answer_ends_with_its_first_stop_string(pieces: list[str], stops: list[str], include_stop: bool) -> None:
    answer = AnswerText(tuple(stops), include_stop=include_stop)
    told, text = "", ""
    for piece in pieces:
        text += piece
        match = first_match(text, stops)
        ready, is_stopped = answer.push(piece)
        told += ready
        assert is_stopped == (match is not None)
        if match is not None:
            assert told == answer.text == text[: match[1] if include_stop else match[0]]
            return
        assert text.startswith(told)
        if include_stop:
            assert told == text
        else:
            held = text[len(told) :]
            assert not held or any(stop.startswith(held) for stop in stops), "held for nothing"
            possible = [text[at:] for at in range(len(text)) if any(stop.startswith(text[at:]) for stop in stops)]
            assert not possible or len(held) >= len(possible[0]), "the beginning of a stop string was told"
    told += answer.flush()
    assert told == answer.text == text


@given(pieces=pieces_strategy, stops=stops_strategy, least=st.integers(0, 6), include_stop=st.booleans())
def test_stop_strings_count_from_the_least_length_on(
    pieces: list[str], stops: list[str], least: int, include_stop: bool
) -> None:
    answer = AnswerText(tuple(stops), include_stop=include_stop)
    text = ""
    for number, piece in enumerate(pieces):
        before, text = len(text), text + piece
        _, is_stopped = answer.push(piece, may_stop=number >= least)
        ends = [at + len(stop) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
        assert is_stopped == (number >= least and any(end > before for end in ends))
        if is_stopped:
            assert text.startswith(answer.text)
            return
    answer.flush()
    assert answer.text == text


def test_without_stop_strings_everything_is_told_at_once() -> None:
    answer = AnswerText((), include_stop=False)
    assert answer.push("any") == ("any", False)
    assert answer.flush() == ""
