"""Text from tokens while they come: whole characters only, and stop strings wherever token borders fall."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers, trainers

from mycel.compute.textstream import (
    UNFINISHED_MAX,
    WINDOW_TOKENS_MAX,
    Detokenizer,
    StopFinder,
    TextStream,
)
from mycel.compute.tokenizer import byte_level_tokenizer_files, read_tokenizer

BYTES = read_tokenizer(byte_level_tokenizer_files())
texts = st.text(st.sampled_from("ab \nä€你😀👍🏽\u200d�"), max_size=120)


def metaspace() -> Inner:
    """A SentencePiece-like tokenizer: words begin with a mark, a text's first space is dropped."""
    inner = Inner(models.BPE(unk_token=None, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=[f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz"),
    )
    inner.train_from_iterator(["the cat sat on the mat and that was that", "words in a row"] * 20, trainer)
    return inner


METASPACE = metaspace()


def decode_metaspace(ids: Sequence[int]) -> str:
    text: str = METASPACE.decode(list(ids), skip_special_tokens=False)
    return text


def stream(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@given(texts)
def test_streamed_text_is_the_decoded_text(text: str) -> None:
    pieces = stream(Detokenizer(BYTES.decode), BYTES.encode(text))
    assert "".join(pieces) == text


@given(texts.filter(lambda text: "�" not in text))
def test_no_piece_holds_half_a_character(text: str) -> None:
    for piece in stream(Detokenizer(BYTES.decode), BYTES.encode(text)):
        assert "�" not in piece
        assert len(piece) <= 1, "every byte is a token, so at most one character comes whole at a time"


@given(st.lists(st.integers(0, 256), max_size=200))
def test_any_bytes_stream_as_they_decode_and_wait_little(ids: list[int]) -> None:
    detokenizer = Detokenizer(lambda window: BYTES.decode(window, skip_special=False))
    seen = ""
    for count, token in enumerate(ids, 1):
        seen += detokenizer.push(token)
        whole = BYTES.decode(ids[:count], skip_special=False)
        assert whole.startswith(seen)
        assert len(whole) - len(seen) <= UNFINISHED_MAX
        assert len(detokenizer._window) <= WINDOW_TOKENS_MAX
    assert seen + detokenizer.flush() == BYTES.decode(ids, skip_special=False)


@given(st.lists(st.sampled_from(["the", "cat", "mat", "that", "€", "😀", "zz"]), max_size=60))
def test_marked_words_keep_their_spaces_across_the_window(words: list[str]) -> None:
    text = " ".join(words)
    ids = METASPACE.encode(text).ids
    assert "".join(stream(Detokenizer(decode_metaspace), ids)) == decode_metaspace(ids) == text


def reference_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Text before the stop that is complete first, character by character."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.lists(st.text("ab", max_size=5), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4, unique=True),
)
def test_stop_is_found_wherever_pieces_end(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    out = "".join(finder.push(piece) for piece in pieces) + finder.flush()
    assert (out, finder.found) == reference_stop("".join(pieces), stops)


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.text("ab", min_size=1, max_size=4))
def test_text_is_held_only_while_it_may_begin_a_stop(pieces: list[str], stop: str) -> None:
    finder, given_, out = StopFinder([stop]), "", ""
    for piece in pieces:
        given_ += piece
        out += finder.push(piece)
        if finder.found is not None:
            return
        held = given_.removeprefix(out)
        assert out + held == given_
        assert stop.startswith(held)
        assert not any(
            stop.startswith(given_[-more:]) for more in range(len(held) + 1, min(len(stop), len(given_) + 1))
        )


def test_stop_across_tokens_of_a_real_stream() -> None:
    answer = BYTES.stream(["\n\n", "END"])
    pieces = [answer.push(token) for token in BYTES.encode("a 😀\nEN EN\nENDless")]
    assert "".join(pieces) + answer.finish() == "a 😀\nEN EN\n"
    assert answer.stopped == "END"
    assert answer.push(65) == ""


def test_held_text_comes_out_at_the_end() -> None:
    answer = BYTES.stream(["END"])
    assert "".join(answer.push(token) for token in BYTES.encode("the EN")) == "the "
    assert answer.finish() == "EN"
    assert answer.stopped is None


def test_unfinished_character_at_the_end_shows_as_replacement() -> None:
    answer = BYTES.stream()
    assert [answer.push(token) for token in (65, 0xF0, 0x9F)] == ["A", "", ""]
    assert answer.finish() == "�"


def test_special_tokens_have_no_text_and_may_be_stops() -> None:
    assert [BYTES.stream().push(token) for token in (256, 65)] == ["", "A"]
    answer = BYTES.stream(["<|end|>", "AB"])
    assert [answer.push(token) for token in (66, 65, 256)] == ["B", "", "A"]
    assert answer.stopped == "<|end|>"


def test_special_token_inside_a_character_does_not_break_it() -> None:
    answer = TextStream(BYTES.decode, BYTES.special)
    assert "".join(answer.push(token) for token in (0xC3, 256, 0xA4)) == "ä"


@pytest.mark.parametrize("stops", [[""], ["a"] * 65, ["a" * 1025]])
def test_senseless_stops_are_refused(stops: list[str]) -> None:
    with pytest.raises(ValueError, match="stop string"):
        StopFinder(stops)
