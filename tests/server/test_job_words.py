"""Errors of jobs in the API's words."""

import ast
import re
from pathlib import Path

import nybble.engine.quantize
import pytest
from nybble.server.job_words import field_of, in_api_words, shown_message
from nybble.server.quantizations import quantization_body

REQUEST = {
    "model": "served-name",
    "output": "mine",
    "calibration": {"source": {"texts": 2}},
    "evaluation": {"source": "held/out.txt"},
    "options": {
        "model": "/elsewhere/model",
        "out": "/models/mine",
        "calibration": "/models/.nybble/texts-12.jsonl",
        "eval_text": "/data/held/out.txt",
    },
}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("--num-samples 0: must be at least 1", "'num_samples' 0: must be at least 1"),
        (
            "--calibration a.txt: too few (--num-samples), or use --method rtn",
            "'calibration' a.txt: too few ('num_samples'), or use 'method' rtn",
        ),
        ("--asym: needs zero; use --sym", "'symmetric' false: needs zero; use 'symmetric' true"),
        ("--report: too much; use --no-report", "'report': too much; use 'report' false"),
        ("--eval-text: has no effect", "'evaluation': has no effect"),
        ("OUT x: must be neither MODEL, nor inside it", "'output' x: must be neither 'model', nor inside it"),
        (
            "OUT x: is not empty; choose another or add --overwrite",
            "'output' x: is not empty; choose another",
        ),
        (
            "--lm-head-bits 4: let nybble serve --lm-head-bits round it",
            "'lm_head_bits' 4: let nybble serve --lm-head-bits round it",
        ),
        ("a--b, x --7 and - stay", "a--b, x --7 and - stay"),
    ],
)
def test_words(said: str, shown: str) -> None:
    assert in_api_words(said) == shown


def test_the_field_that_an_error_begins_with() -> None:
    assert [field_of(m) for m in ("--bits 5: no", "--budget-bits: no", "--asym: no", "OUT x: no")] == [
        *("bits", "budget_bits", "symmetric", "output"),
    ]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("MODEL /elsewhere/model: is quantized already", "'model' served-name: is quantized already"),
        ("/elsewhere/model/config.json: no", "served-name/config.json: no"),
        ("OUT /models/mine: cannot be written", "'output' mine: cannot be written"),
        ("--calibration texts-12.jsonl: 3 tokens", "'calibration' texts: 3 tokens"),
        ("--calibration /models/.nybble/texts-12.jsonl: empty", "'calibration' texts: empty"),
        ("--eval-text /data/held/out.txt: empty", "'evaluation' held/out.txt: empty"),
        ("/models/other: gone", "other: gone"),
    ],
)
def test_what_was_sent_instead_of_paths(said: str, shown: str) -> None:
    assert shown_message(said, REQUEST) == shown


def test_every_option_that_a_job_names_is_a_field() -> None:
    """Whatever the quantizers' sentences say, a client can find in the body."""
    known = set(quantization_body().model_fields)
    known |= {"num_threads"}  # the server's own, which is never wrong
    (package,) = nybble.engine.quantize.__path__
    trees = [ast.parse(path.read_text()) for path in Path(package).glob("*.py")]
    texts = [n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    found = set()
    for text in (text for text in texts if isinstance(text, str) and re.search(r"(?<![\w-])--[a-z]", text)):
        shown = in_api_words(text)
        assert not re.search(r"(?<!nybble serve )--[a-z]", shown), shown
        found |= set(re.findall(r"'([a-z_]+)'", shown))
    assert {"num_samples", "calibration", "symmetric", "method"} <= found
    assert found - known == set()
