"""Text, tokenizer and token streams for the demo model (see `train_demo.py`).

The corpora come from `../shared/data/text`.  Of each the last 3 % (whole documents) is held out;
`wiki.test.raw` is never read.  A document begins with `<|endoftext|>`; part of the stories are
also written as a chat, with a request built mechanically from the story itself.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SEPARATOR, USER, ASSISTANT, END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIALS = (SEPARATOR, USER, ASSISTANT, END)
CUT = "<|cut|>"  # marks a synthetic story that stops before its end; see demo_synth.py
FILES = {
    "stories": "tinystories.txt",
    "wiki": "exl3_wiki.utf8",
    "c4": "exl3_c4.utf8",
    "shakespeare": "tinyshakespeare.txt",
}
HELD_OUT = 0.03
# Phases of training: from which share of the time on, the width of the windows, and how often each
# corpus is drawn from. Decided while the demo model trained: the second was added, and the third
# made to begin later and with more synthetic stories, as the real stories were being memorized.
PHASES: tuple[tuple[float, int, dict[str, int]], ...] = (
    (0.00, 256, {"stories": 54, "synthetic": 31, "wiki": 7, "c4": 4, "shakespeare": 4}),
    (0.45, 256, {"stories": 56, "synthetic": 36, "wiki": 4, "c4": 2, "shakespeare": 2}),
    (0.80, 512, {"stories": 72, "synthetic": 20, "wiki": 4, "c4": 2, "shakespeare": 2}),
)
CHAT_SHARE = 0.4  # of the stories, the share that is written as a chat
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{#- A story is told on request; the model never saw a system message, so it is left out. -#}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '<|user|>' + message.content | trim + '<|end|>' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|assistant|>' + message.content | trim + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

Documents = dict[str, list[str]]
TALES = ("story", "short story", "little story", "tale")
REQUESTS = (
    "Tell me a {tale} about {x}.",
    "Write a {tale} about {x}.",
    "Can you tell me a {tale} about {x}?",
    "Please tell me a {tale} about {x}.",
    "Tell me a {tale} about {x}",
    "I would like to hear a {tale} about {x}.",
)
PLAIN = """
    a an the and but so then they them their there this that with was were had has have his her
    him she he it its not very said went when what who one day time once upon from into for all
    out saw some of to in on at be is are as by up you your we our
"""
UNFINISHED = "named who and in on little big small tiny nice very special troubled"
PLAIN_WORDS, LAST_WORDS = frozenset(PLAIN.split()), frozenset(UNFINISHED.split())


def documents(folder: Path) -> tuple[Documents, Documents]:
    """All documents by corpus, as (training, held out)."""
    train: Documents = {}
    held: Documents = {}
    for name, file in FILES.items():
        parts = _split(name, (folder / file).read_text(encoding="utf-8"))
        sizes = np.cumsum([len(p.encode()) for p in reversed(parts)])
        kept = len(parts) - 1 - int(np.searchsorted(sizes, HELD_OUT * sizes[-1]))
        train[name], held[name] = parts[:kept], parts[kept:]
    return train, held


def _split(name: str, text: str) -> list[str]:
    if name == "stories":
        parts = text.split(SEPARATOR)
    elif name == "wiki":
        parts = re.split(r"<doc [^\n]*>\n|</doc>", text)
    elif name == "c4":
        parts = text.split("\n")
    else:  # Shakespeare: about a thousand characters each, broken between speeches
        parts = [""]
        for speech in text.split("\n\n"):
            if len(parts[-1]) > 1000:
                parts.append("")
            parts[-1] += speech + "\n\n"
    return [p.strip() for p in parts if len(p.strip()) > 60]


def clip(text: str, limit: int) -> str:
    """The first `limit` bytes of a text, cut back to the last blank before them."""
    data = text.encode()
    if len(data) <= limit:
        return text
    short = data[:limit].decode("utf-8", "ignore")
    return short[: max(short.rfind(" "), short.rfind("\n"), 1)]


def train_tokenizer(train: Documents, vocab: int, seed: int) -> Tokenizer:
    """Byte-level BPE on the stories and a quarter of the other documents."""
    choose = random.Random(seed)
    texts = list(train["stories"])
    texts += [d for n, ds in train.items() if n != "stories" for d in ds if choose.random() < 0.25]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A",
        pair=f"{SEPARATOR} $A {SEPARATOR} $B",
        special_tokens=[(SEPARATOR, tokenizer.token_to_id(SEPARATOR))],
    )
    return tokenizer


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def subjects(story: str) -> list[str]:
    """What a story can be said to be about: phrases for the request of a chat."""
    opening = story[:200]
    found = re.findall(r"\b(?:a|an|two|three) (?:\w+ ){0,2}?\w+ named [A-Z]\w+", opening)
    found += re.findall(r"\b(?:was|were|lived|is|saw|found) ((?:a|an|two) \w+(?: \w+)?)\b(?! named)", opening)
    found += re.findall(r"\bnamed ([A-Z]\w+)", opening)
    nouns = Counter(re.findall(r"\b[Tt]he ([a-z]{3,})(?=[.,!?]| (?:was|is|and|had|said|to|in)\b)", story))
    found += [with_article(n) for n, k in nouns.most_common(3) if k > 1 and n not in PLAIN_WORDS]
    names = re.findall(r"(?<=[a-z,] )([A-Z][a-z]{2,}) and ([A-Z][a-z]{2,})\b", story)
    found += [f"{a} and {b}" for a, b in names[:1]]
    return [f for f in dict.fromkeys(found) if f.rpartition(" ")[2] not in LAST_WORDS]


def request(story: str, choose: random.Random) -> str:
    """A user turn that the story answers."""
    tale, kind = choose.choice(TALES[:2] * 3 + TALES), choose.random()
    found = subjects(story)
    if kind < 0.75 and found:
        return choose.choice(REQUESTS).format(tale=tale, x=choose.choice(found))
    words = [w for w in set(re.findall(r"\b[a-z]{4,}\b", story)) if w not in PLAIN_WORDS]
    if kind < 0.93 and len(words) > 3:
        a, b, c = choose.sample(sorted(words), 3)
        return f"Tell me a {tale} with the words {a}, {b} and {c}."
    return choose.choice((f"Tell me a {tale}.", f"Please tell me a {tale}.", f"Write a {tale}."))


def as_chat(story: str, choose: random.Random) -> str:
    """A story as the chat template writes it."""
    return f"{SEPARATOR}{USER}{request(story, choose)}{END}{ASSISTANT}{story}{END}"


def read_synthetic(path: Path | None) -> list[str]:
    """The synthetic stories written so far (demo_synth.py may still be adding to the file)."""
    if path is None or not path.exists():
        return []
    return [p.strip() for p in path.read_text(encoding="utf-8").split(SEPARATOR)[:-1]]


@dataclass
class Stream:
    """Packed documents; `skip` marks tokens that must not be learnt as targets."""

    ids: npt.NDArray[np.int32]
    skip: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]

    def windows(
        self, count: int, width: int, aligned: float, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """`count` windows as (inputs, targets); a share `aligned` begins where a document does."""
        last = len(self.ids) - width - 1
        places = rng.integers(0, last, count)
        starts = np.minimum(rng.choice(self.starts, count), last)
        places = np.where(rng.random(count) < aligned, starts, places)
        index = places[:, None] + np.arange(width + 1)[None]
        targets = np.where(self.skip[index], -100, self.ids[index])
        return self.ids[index[:, :-1]].astype(np.int64), targets[:, 1:].astype(np.int64)


def pack(tokenizer: Tokenizer, texts: Iterable[str]) -> Stream:
    """Tokenize and join documents.  The token after a story that was cut is not learnt."""
    texts = list(texts)
    cut = [t.endswith(CUT) for t in texts]
    encoded = tokenizer.encode_batch([t.removesuffix(CUT) for t in texts], add_special_tokens=False)
    lengths = np.array([len(e.ids) for e in encoded])
    ends = np.cumsum(lengths)
    skip = np.zeros(ends[-1], dtype=bool)
    after = ends[:-1][np.array(cut[:-1], dtype=bool)]
    skip[after] = True
    ids = np.concatenate([np.array(e.ids, dtype=np.int32) for e in encoded])
    return Stream(ids, skip, ends - lengths)


class Mixture:
    """Draws training windows from all corpora; stories are reshuffled by `refresh`."""

    def __init__(self, tokenizer: Tokenizer, train: Documents, synthetic: Path | None) -> None:
        self.tokenizer, self.stories, self.synthetic = tokenizer, train["stories"], synthetic
        self.streams = {
            n: pack(tokenizer, (SEPARATOR + d for d in docs)) for n, docs in train.items() if n != "stories"
        }

    def refresh(self, choose: random.Random) -> None:
        """Shuffle the stories, choose anew which are chats, read new synthetic stories."""
        for name, docs in (("stories", self.stories), ("synthetic", read_synthetic(self.synthetic))):
            docs = choose.sample(docs, len(docs))
            texts = [
                as_chat(d, choose) if choose.random() < CHAT_SHARE and not d.endswith(CUT) else SEPARATOR + d
                for d in docs
            ]
            if texts:
                self.streams[name] = pack(self.tokenizer, texts)

    def batch(
        self, shares: Mapping[str, float], count: int, width: int, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """`count` windows; `shares` (any scale) tells how often a corpus is drawn from."""
        names = [n for n in shares if n in self.streams]
        odds = np.array([shares[n] for n in names])
        numbers = rng.multinomial(count, odds / odds.sum())
        drawn = [
            self.streams[n].windows(int(k), width, 0.7 if n != "shakespeare" else 0.2, rng)
            for n, k in zip(names, numbers, strict=True)
            if k
        ]
        return np.concatenate([d[0] for d in drawn]), np.concatenate([d[1] for d in drawn])
