"""Text that is sent piece by piece, against the text of the whole completion."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from rheostat.engines.base import Request
from rheostat.engines.decode import finish
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.serving.server.answers import TextStream
from rheostat.types import Prompt

TEXTS = (EOS, "1", "12", "2 ", " ", "21")


class Bytes:
    """A vocabulary of single bytes: most characters need several tokens."""

    eos_ids = frozenset({256})
    texts = [bytes([value]).decode(errors="replace") for value in range(256)] + [EOS]

    def decode(self, token_ids: Any) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")


@given(
    st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=12),
    st.lists(st.sampled_from(["1", "22", "122", "2 1", "1212", "  "]), max_size=3),
)
def test_pieces_are_the_text_and_no_part_of_a_stop_string(tokens: list[int], stops: list[str]) -> None:
    vocabulary = FakeEngine(TEXTS).vocabulary
    request = Request(Prompt("p", "1", tuple(stops)), None, 0, 0, len(tokens))
    stream, sent = TextStream(vocabulary, stops), ""
    for count in range(1, len(tokens) + 1):
        completion = finish(vocabulary, request, tokens[:count])
        if completion is not None:
            assert completion.text.startswith(sent)  # nothing was sent that had to be taken back
            assert sent + stream.finish(completion.text) == completion.text
            return
        sent += stream.push(tokens[count - 1])
        written = vocabulary.decode(tokens[:count])
        held = written.removeprefix(sent)
        assert written == sent + held
        assert not held or any(stop.startswith(held) for stop in stops)  # and no more is held back than must be
    raise AssertionError("the last token ends it")


@given(st.text(max_size=20))
def test_half_a_character_waits_for_the_rest(text: str) -> None:
    data = text.encode()
    stream, sent = TextStream(Bytes(), ()), ""
    for value in data:
        sent += stream.push(value)
        assert text.startswith(sent)
    assert sent + stream.finish(text) == text
    assert sent == text or "\ufffd" in text
