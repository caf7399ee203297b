"""The oracle is transformers' AutoTokenizer."""

import asyncio
import json
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from nybble.engine.errors import CheckpointError, ConfigError, RequestError, UnsupportedModelError
from nybble.engine.tokenizer import Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
FOLDERS = ["tokenizers/qwen2", "tokenizers/gpt2", "models/tiny1m"]

HARD_TEXTS = [
    "",
    " ",
    "\n\n  \t",
    "Hello, world! It's 12:30.",
    "  leading and trailing  ",
    "naïve café — “quotes” … ½",
    "你好，世界。こんにちは 안녕하세요",
    "😀👨‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u202eabc",
    "<|endoftext|> and <|im_start|>user\nhi<|im_end|></s><s><unk>",
    "a\u0000b\r\nc\u00a0d\ufffd",
    "def f(x):\n    return x**2  # comment\n",
    "1234567890" * 5,
    "a" * 300,
]


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request):
    folder = DATA / request.param
    if not folder.exists():
        pytest.skip(f"{request.param} of ../shared/data is absent")
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("special", [True, False])
def test_encode_equals_transformers(pair, special):
    ours, theirs = pair
    for text in HARD_TEXTS:
        assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special)


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=40))
def test_encode_of_random_text_equals_transformers(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_decode_equals_transformers(pair, data, skip):
    ours, theirs = pair
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=20))
    text = ours.decode(ids, skip_special_tokens=skip)
    if theirs.convert_tokens_to_ids("<0xE4>") != theirs.unk_token_id and "\ufffd" in text:
        return  # byte fallback that is not UTF-8: see test_bad_byte_fallback_costs_only_the_bad_bytes
    assert text == theirs.decode(ids, skip_special_tokens=skip)


def test_special_tokens_equal_transformers(pair):
    ours, theirs = pair
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)


def test_token_bytes_join_to_the_text(pair):
    ours, _ = pair
    text = "An 你好 \U00010348 naïve end"
    ids = ours.encode(text, add_special_tokens=False)
    assert b"".join(ours.token_bytes(i) for i in ids).decode().strip() == text.strip()
    assert all(ours.token_text(i) == ours.token_bytes(i).decode("utf-8", "replace") for i in ids)
    assert any("\ufffd" in ours.token_text(i) for i in ids)  # the rare letter is several tokens


def test_ids_that_do_not_exist_give_nothing(pair):
    ours, _ = pair
    for missing in (-1, ours.vocab_size, 1 << 31, 1 << 40):
        assert ours.token_bytes(missing) == b""
        assert ours.token(missing) is None
        assert ours.decode([missing]) == ""


def test_lone_surrogate_is_the_requests_fault(pair):
    with pytest.raises(RequestError, match="surrogate"):
        pair[0].encode("a\ud800b")


async def test_long_text_does_not_stall_the_event_loop(pair):
    ours, _ = pair
    text = "The quick brown fox, 你好. " * 10_000
    began = time.perf_counter()
    task = asyncio.create_task(ours.encode_async(text))
    ticks = 0
    while not task.done():
        await asyncio.sleep(0.001)
        ticks += 1
    seconds = time.perf_counter() - began
    assert task.result() == ours.encode(text)
    assert ticks > 20 * seconds  # the loop went on meanwhile (a stalled one ticks once or twice in all)


def _word_level(decoder) -> tokenizers.Tokenizer:
    vocab = {
        t: i for i, t in enumerate(["▁", "a", "▁b", "▁▁c", "d▁e", "<0x20>", "<0xC3>", "<0xA9>", "<0x41>"])
    }
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    return backend


DECODERS = {
    "llama": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "metaspace": decoders.Metaspace("▁", "always"),
    "metaspace never": decoders.Metaspace("▁", "never"),
    "none": None,
}


@pytest.mark.parametrize("name", DECODERS)
@given(ids=st.lists(st.integers(0, 9), max_size=8))
def test_every_supported_decoder_equals_the_library(name, ids):
    backend = _word_level(DECODERS[name])
    text = Tokenizer(backend).decode(ids)
    if "\ufffd" not in text:
        assert text == backend.decode(ids)


def test_bad_byte_fallback_costs_only_the_bad_bytes():
    backend = _word_level(DECODERS["llama"])
    ids = [1, 6, 7, 6, 1]  # a, e-acute, half of one, a
    assert Tokenizer(backend).decode(ids) == "aé\ufffda"
    assert backend.decode(ids) == "a\ufffd\ufffd\ufffda"  # the reason why we differ


@pytest.mark.parametrize(
    "decoder", [decoders.WordPiece(), decoders.CTC(), decoders.Sequence([decoders.Strip(" ", 1, 0)])]
)
def test_decoders_that_need_whole_sequences_are_refused(decoder):
    with pytest.raises(UnsupportedModelError, match="decoder"):
        Tokenizer(_word_level(decoder))


def _save(folder: Path, config: dict, added: list | None = None) -> Path:
    backend = tokenizers.Tokenizer(
        models.BPE({"a": 0, "b": 1, "c": 2, "<bos>": 3, "Ġ": 4}, [], unk_token="a")
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for token in added or []:
        backend.add_tokens([token])
    if "<bos>" in (added or []):
        backend.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 3)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
    )
    return folder


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"bos_token": "<bos>"}, None),  # in the vocabulary, not yet special
        ({"bos_token": "<bos>", "add_bos_token": True}, None),  # not read where there is a tokenizer.json
        ({"bos_token": "<bos>", "add_bos_token": False}, ["<bos>"]),
        ({"eos_token": "<new>", "pad_token": "<pad>"}, None),  # added behind the vocabulary
        (
            {
                "eos_token": {
                    "__type": "AddedToken",
                    "content": "<new>",
                    "lstrip": True,
                    "rstrip": False,
                    "normalized": False,
                }
            },
            None,
        ),
        ({"extra_special_tokens": ["<x>", "<y>"]}, ["<z>"]),
        ({"additional_special_tokens": ["<x>"]}, None),
        (
            {
                "added_tokens_decoder": {
                    "6": {"content": "<tool>", "special": False},
                    "5": {"content": "<|e|>", "special": True},
                },
                "eos_token": "<|e|>",
            },
            None,
        ),
    ],
)
def test_configured_special_tokens_equal_transformers(tmp_path, config, added):
    folder = _save(tmp_path, config, added)
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    text = "ab<bos>c <new> <pad><x>a<y><z><|e|>b<tool> c"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False)
    ids = list(range(ours.vocab_size))
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)


def test_legacy_special_tokens_map(tmp_path):
    folder = _save(tmp_path, {})
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<bos>", "lstrip": false}}')
    assert Tokenizer.from_folder(folder).eos_token == "<bos>"
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<bos>"


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    folder = _save(tmp_path, {})
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=10)
    backend.save(str(folder / "tokenizer.json"))
    assert Tokenizer.from_folder(folder).encode("abcabc") == [0, 1, 2, 0, 1, 2]


@pytest.fixture(
    params=[("gpt2", "GPT2Tokenizer"), ("qwen2", "Qwen2TokenizerFast")], ids=lambda param: param[0]
)
def slow_folder(request, tmp_path):
    """A folder with vocab.json, merges.txt and the added tokens of a real tokenizer.json."""
    name, kind = request.param
    source = DATA / "tokenizers" / name
    if not source.exists():
        pytest.skip(f"{source.name} of ../shared/data is absent")
    parsed = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(parsed["model"]["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in parsed["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    added = {token.pop("id"): token for token in parsed["added_tokens"]}
    config = {"tokenizer_class": kind, "added_tokens_decoder": added, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_vocab_and_merges_equal_transformers(slow_folder):
    ours, theirs = Tokenizer.from_folder(slow_folder), AutoTokenizer.from_pretrained(slow_folder)
    for text in HARD_TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids, False) == theirs.decode(ids)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tokenizer_class": "OtherTokenizer"},
        {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True},
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
    ],
)
def test_vocab_and_merges_that_mean_something_else(tmp_path, config):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("a b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"only vocab\.json; write it once with"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert Tokenizer.from_folder(tmp_path).encode("ab") == [2]


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        (None, "", ConfigError, "no tokenizer.json"),
        ("tokenizer.model", "x", ConfigError, "only tokenizer.model; write it once with"),
        ("tokenizer.json", "{}", CheckpointError, "not a tokenizer"),
        ("tokenizer.json", "\x00", CheckpointError, "not a tokenizer"),
    ],
)
def test_folders_without_a_usable_tokenizer(tmp_path, name, content, error, words):
    if name is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=words):
        Tokenizer.from_folder(tmp_path)
