"""Folders without a ``tokenizer.json``: GPT-2's and Qwen2's vocab.json + merges.txt, as transformers 5 does.

Other kinds (sentencepiece, tiktoken) need transformers to convert them; the error says how.
"""

from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from .errors import CheckpointError, ConfigError
from .model_files import Json

_SLOW_FILES = ("vocab.json", "tokenizer.model", "spiece.model", "tekken.json", "vocab.txt", "tiktoken.model")
_CHANGES_TEXT = ("add_prefix_space", "add_bos_token", "add_eos_token")  # options that we do not follow
_END = "<|endoftext|>"
_DEFAULTS: dict[str, Json] = {
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "Qwen2Tokenizer": {"eos_token": _END, "pad_token": _END, "unk_token": _END},
}
# Words, single digits, punctuation with its line ends, line ends, other space.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_slow_tokenizer(folder: Path, config: Json) -> tuple[tokenizers.Tokenizer, Json]:
    """The tokenizer, and ``config`` (tokenizer_config.json) with its class's defaults.

    Raises ConfigError where that cannot be done exactly.
    """
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    exact = kind in _DEFAULTS and not any(config.get(option) for option in _CHANGES_TEXT)
    # Without added_tokens_decoder, older files hold the added tokens in ways that we do not read.
    exact = exact and ("added_tokens_decoder" in config or not (folder / "added_tokens.json").exists())
    if not (exact and vocab.exists() and merges.exists()):
        raise ConfigError(_remedy(folder))
    try:
        model = models.BPE(*models.BPE.read_file(str(vocab), str(merges)))
    except Exception as error:  # `tokenizers` raises the base class itself
        raise CheckpointError(f"{vocab} and {merges.name}: not a tokenizer ({str(error)[:200]})") from error
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.ByteLevel()
    if kind == "GPT2Tokenizer":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return backend, _DEFAULTS[kind] | config


def _remedy(folder: Path) -> str:
    slow = [name for name in _SLOW_FILES if (folder / name).exists()]
    if not slow:
        return f"{folder}: no tokenizer.json; copy it from the model that this one was made from"
    return (
        f"{folder}: no tokenizer.json, only {slow[0]}; write it once with: python -c 'from transformers "
        f'import AutoTokenizer as A; A.from_pretrained("{folder}").save_pretrained("{folder}")\''
    )
