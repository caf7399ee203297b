"""Windows of documents."""

from pathlib import Path

import numpy
import pytest
import torch
from nybble.engine.documents import Encoder, read_documents
from nybble.engine.errors import ConfigError
from nybble.engine.scorers import score_windows
from nybble.engine.scoring import Window, cut_windows, perplexity, read_windows
from nybble.engine.tokenizer import Tokenizer
from tiny_tokenizer import write_tokenizer


@pytest.mark.parametrize(("length", "max_len"), [(5, 8), (8, 8), (9, 8), (12, 8), (13, 8), (100, 8), (64, 7)])
def test_each_token_is_scored_once(length: int, max_len: int) -> None:
    ids = list(range(length))
    windows = cut_windows(ids, max_len)
    scored = [token for window in windows for token in window.token_ids[window.first :]]
    assert scored == ids[1:]
    for window in windows:
        start = window.token_ids[0]
        assert list(window.token_ids) == ids[start : start + len(window.token_ids)]
        assert len(window.token_ids) <= max_len
        assert window is windows[0] or window.first >= max_len // 2


@pytest.mark.parametrize("limit", [1, 3, 5, 6, 20, 1000])
def test_a_limit_of_tokens_is_kept_exactly(limit: int, tmp_path: Path) -> None:
    """What is scored is the beginning of what is scored without a limit."""
    folder = write_tokenizer(tmp_path / "tokenizer")
    encoder = Encoder(folder, Tokenizer.from_folder(folder))
    (tmp_path / "text.txt").write_text(
        "the cat and the dog<|endoftext|>" + "went to the sea in the rain " * 3
    )
    documents = read_documents(tmp_path / "text.txt", "--text")
    whole = read_windows(documents, encoder, None, 8)
    assert whole.whole
    assert whole.num_scored > 20
    some = read_windows(documents, encoder, None, 8, max_tokens=limit)
    assert some.num_scored == min(limit, whole.num_scored)
    assert some.whole == (limit > whole.num_scored)
    assert (some.num_bytes == whole.num_bytes) == some.whole
    scored, all_scored = (
        [token for window in passage.windows for token in window.token_ids[window.first :]]
        for passage in (some, whole)
    )
    assert scored == all_scored[: len(scored)]
    first = read_windows(documents, encoder, None, 8, max_documents=1)
    assert (first.whole, first.num_bytes) == (False, len("the cat and the dog"))


def test_perplexity_of_hopeless_models() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) == float("inf")


@pytest.mark.parametrize("rows", [1, 3, 512])
def test_the_standard_error_is_that_of_windows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy, on the differences of all tokens; however rows and windows are cut into batches."""
    monkeypatch.setattr("nybble.engine.scorers.LOGIT_ROWS", rows)
    monkeypatch.setattr("nybble.engine.scoring.BATCH_TOKENS", 20)
    random = numpy.random.default_rng(0)
    ids = [tuple(random.integers(4, size=size).tolist()) for size in (9, 2, 5, 14, 3, 11, 30)]
    windows = [window for document in ids for window in cut_windows(list(document), 12)]
    tables = random.normal(size=(2, 4, 4)) - 2
    ours, theirs = (_Bigram(torch.tensor(table)) for table in tables)
    score = score_windows(windows, ours, theirs, lambda *_: None)
    sums, sizes = [], []
    for window in windows:
        pairs = list(zip(window.token_ids, window.token_ids[1:], strict=False))[window.first - 1 :]
        differences = [tables[1][a][b] - tables[0][a][b] for a, b in pairs]
        sums.append(numpy.sum(differences))
        sizes.append(len(differences))
    total, count = numpy.sum(sizes), len(sizes)
    mean = numpy.sum(sums) / total
    expected = numpy.std(sums - mean * numpy.array(sizes), ddof=1) * numpy.sqrt(count) / total
    assert score.rise.standard_error() == pytest.approx(expected, rel=1e-9)
    assert score.rise.figures()["windows"] == count > len(ids)
    assert (
        score.rise.total / total
        == pytest.approx(mean)
        == pytest.approx((score.nll - score.original_nll) / total)
    )
    alone = score_windows(windows[:1], ours, theirs, lambda *_: None)
    assert alone.rise.figures() == {"nll_increase": None, "windows": 1}
    assert score_windows(windows, ours, ours, lambda *_: None).rise.standard_error() == 0


class _Bigram:
    """Log-probabilities (of whatever sum) that the last token decides: [4, 4]."""

    device = "cpu"
    vocab_size = 4

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def read(self, batch: list[Window]) -> None:
        self.token_ids = torch.tensor([i for window in batch for i in window.token_ids])

    def logprobs(self, rows: torch.Tensor) -> torch.Tensor:
        return self.table[self.token_ids[rows]]


class _Constant:
    """Predicts the same for every token."""

    device = "cpu"
    vocab_size = 4

    def __init__(self, logprob: float) -> None:
        self.logprob = logprob

    def read(self, batch: list[Window]) -> None:
        pass

    def logprobs(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.full((len(rows), self.vocab_size), self.logprob)


@pytest.mark.parametrize("against", [None, _Constant(-1.0)])
def test_predictions_that_are_not_finite(against: _Constant | None) -> None:
    windows = [Window((0, 1, 2), 1)]
    assert score_windows(windows, _Constant(-1.5), against, lambda *_: None).nll == 3.0
    for broken in (float("nan"), -float("inf")):
        with pytest.raises(ConfigError, match="the model's predictions are not finite"):
            score_windows(windows, _Constant(broken), against, lambda *_: None)
