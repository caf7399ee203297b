"""The property: joined deltas are the whole decoded text, cut at the first stop string."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from nybble.engine.detokenizer import Delta, Detokenizer
from nybble.engine.tokenizer import Tokenizer
from tokenizers import decoders, models

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
TEXTS = [
    "Once upon a time, there was a 你好 girl 😀 named e\u0301lodie. ",
    "👨‍👩‍👧‍👦 안녕하세요 naïve</s><|endoftext|>  two  spaces\n\n",
]


@pytest.fixture(scope="module", params=["tokenizers/qwen2", "tokenizers/gpt2", "models/tiny1m"])
def tokenizer(request):
    folder = DATA / request.param
    if not folder.exists():
        pytest.skip(f"{request.param} of ../shared/data is absent")
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def letters():
    """Each character of the alphabet one token; 0 is special; the last two are halves of a character."""
    names = ["<s>", "a", "b", "c", "Ġ", "ab", "Ã", "©"]
    backend = tokenizers.Tokenizer(models.WordLevel({t: i for i, t in enumerate(names)}, unk_token="a"))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {"bos_token": "<s>"})


def spell(tokenizer, text):
    return [tokenizer.token_id(char) for char in text]


def first_stop(text, stops):
    """By brute force: the stop that ends first, of those that end there the longest; (cut text, stop)."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if stop and text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def chunked(draw, ids):
    chunks = []
    rest = list(ids)
    while rest:
        size = draw(st.integers(0, 4))
        chunks.append(rest[:size])
        rest = rest[size:]
    return chunks


def random_ids(draw, tokenizer):
    """Tokens of real text and any tokens at all, mixed."""
    words = [tokenizer.encode(text, False) for text in TEXTS]
    pieces = st.one_of(
        st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=6),
        st.sampled_from(words).flatmap(
            lambda ids: st.integers(0, len(ids) - 1).map(lambda start: ids[start : start + 8])
        ),
    )
    return [token_id for piece in draw(st.lists(pieces, max_size=4)) for token_id in piece]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_deltas_join_to_the_decoded_text(tokenizer, data, skip):
    ids = random_ids(data.draw, tokenizer)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    text, offsets = "", []
    for chunk in chunked(data.draw, ids):
        delta = detokenizer.push(chunk)
        assert delta.num_tokens == len(delta.offsets) == len(chunk)
        text += delta.text
        offsets += delta.offsets
        assert whole.startswith(text)  # nothing sent was wrong: no half of a character among it
    last = detokenizer.finish()
    assert text + last.text == whole
    assert len(offsets) == len(ids)
    assert offsets == sorted(offsets)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), include=st.booleans())
def test_text_ends_at_the_first_stop_string(tokenizer, data, include):
    ids = random_ids(data.draw, tokenizer)
    whole = tokenizer.decode(ids)
    cut = st.integers(0, max(0, len(whole) - 1)).flatmap(
        lambda start: st.integers(1, 8).map(lambda size: whole[start : start + size])
    )
    stops = data.draw(st.lists(st.one_of(cut, st.sampled_from(["aab", "\n", " the", "\ufffd"])), max_size=4))
    expected, expected_stop = first_stop(whole, stops)
    detokenizer = Detokenizer(tokenizer, stop=stops, include_stop_str_in_output=include)
    text, counted, stopped = "", 0, None
    for chunk in chunked(data.draw, ids):
        delta = detokenizer.push(chunk)
        text, stopped = text + delta.text, delta.stopped
        counted += delta.num_tokens
        if stopped is not None:
            break
    last = detokenizer.finish()
    text, stopped = text + last.text, last.stopped
    assert stopped == expected_stop
    assert text == expected + (expected_stop if include and expected_stop else "")
    # The counted tokens are the fewest whose text holds the stop.
    if expected_stop is not None and "\ufffd" not in whole + expected_stop:
        assert first_stop(tokenizer.decode(ids[:counted]), stops)[1] is not None
        assert first_stop(tokenizer.decode(ids[: counted - 1]), stops)[1] is None


@given(data=st.data())
def test_stops_of_few_letters(letters, data):
    """A tiny alphabet makes overlaps frequent."""
    ids = data.draw(st.lists(st.sampled_from([1, 2, 3, 5]), max_size=14))
    stops = data.draw(st.lists(st.text("abc", max_size=4), max_size=4))
    expected, expected_stop = first_stop(letters.decode(ids), stops)
    detokenizer = Detokenizer(letters, stop=stops)
    text = ""
    for token_id in ids:
        delta = detokenizer.push([token_id])
        text += delta.text
        # Only what may still become a stop is held back.
        assert delta.stopped or all(not s or not text.endswith(s) for s in stops)
    last = detokenizer.finish()
    assert (text + last.text, last.stopped) == (expected, expected_stop)


def test_overlapping_stop(letters):
    detokenizer = Detokenizer(letters, stop=["aab"])
    texts = [detokenizer.push([token_id]).text for token_id in spell(letters, "aaa")]
    assert texts == ["", "", "a"]
    delta = detokenizer.push(spell(letters, "bc"))
    assert (delta.text, delta.num_tokens, delta.stopped) == ("", 1, "aab")
    assert detokenizer.push([1]) == detokenizer.finish() == Delta("", 0, [], "aab")


def test_held_text_is_flushed_when_it_cannot_be_a_stop(letters):
    detokenizer = Detokenizer(letters, stop=["abc"])
    assert [detokenizer.push([i]).text for i in spell(letters, "abab")] == ["", "", "ab", ""]
    assert detokenizer.finish().text == "ab"


def test_longest_of_stops_that_end_together(letters):
    detokenizer = Detokenizer(letters, stop=["c", "bc", "zzz"])
    delta = detokenizer.push(spell(letters, "abc"))
    assert (delta.text, delta.stopped, delta.num_tokens) == ("a", "bc", 3)


def test_half_a_character_waits_and_is_replaced_at_the_end_only(letters):
    detokenizer = Detokenizer(letters)
    assert detokenizer.push([1, 6]).text == "a"
    assert detokenizer.push([7]).text == "é"
    assert detokenizer.push([6]).text == ""
    assert detokenizer.finish().text == "\ufffd"


def test_offsets_are_where_the_tokens_begin(letters):
    delta = Detokenizer(letters, stop=["zz"]).push([0, 5, 6, 7, 4, 1])
    assert delta.offsets == [0, 0, 2, 2, 3, 4]


def test_empty_push(letters):
    detokenizer = Detokenizer(letters, stop=["a"])
    delta = detokenizer.push([])
    assert (delta.text, delta.num_tokens, delta.stopped) == ("", 0, None)


def test_text_that_continues_a_prompt_keeps_its_space():
    folder = DATA / "models/tiny1m"
    if not folder.exists():
        pytest.skip("tiny1m of ../shared/data is absent")
    tokenizer = Tokenizer.from_folder(folder)
    prompt, ids = tokenizer.encode("Once upon"), tokenizer.encode("a time", False)
    assert Detokenizer(tokenizer, prompt_token_ids=prompt).push(ids).text == " a time"
    assert Detokenizer(tokenizer).push(ids).text == "a time"
    assert Detokenizer(tokenizer, prompt_token_ids=[1]).push(ids).text == "a time"  # only <s> before it


def test_text_that_continues_inside_a_character(letters):
    assert Detokenizer(letters, prompt_token_ids=[1, 6]).push([7]).text == "é"
