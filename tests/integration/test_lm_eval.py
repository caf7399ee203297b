"""lm-eval's ``local-completions`` scores through the server what transformers scores on its own."""

import json
from pathlib import Path

import pytest
import torch
from live_server import DEMO, LiveServer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lm-eval[api]' (make interop)")

DOCUMENTS = [
    ("Once upon a time, there was a little", " girl named Lily."),
    ("The dog ran to the park. He saw a", " big ball and wanted to play."),
    ("Tom and his mom went to the store to buy", " zebra quantum parliament"),
    ("She was very happy because", " she found her toy."),
    ("The museum was built in 1912 and", " is located in the city centre."),
]
TASK = """
task: nybble_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.mark.filterwarnings("ignore")
def test_loglikelihood_agrees_with_transformers(live_server: LiveServer, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps({"context": c, "continuation": t}) + "\n" for c, t in DOCUMENTS))
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    result = simple_evaluate(
        model="local-completions",
        model_args={
            "base_url": f"{live_server.url}/v1/completions",
            "model": "demo",
            "tokenizer": str(DEMO),
            "tokenizer_backend": "huggingface",
            "max_length": 512,
            "num_concurrent": 1,
        },
        tasks=["nybble_local"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    measured = {}
    for sample in result["samples"]["nybble_local"]:
        context, continuation = (
            sample["arguments"][0]
            if isinstance(sample["arguments"], list)
            else (
                sample["arguments"]["gen_args_0"]["arg_0"],
                sample["arguments"]["gen_args_0"]["arg_1"],
            )
        )
        measured[context, continuation] = sample["resps"][0][0]
    assert len(measured) == len(DOCUMENTS)
    for (context, continuation), (logprob, is_greedy) in measured.items():
        expected, expected_greedy = _transformers_loglikelihood(context, continuation)
        assert float(logprob) == pytest.approx(expected, abs=1e-3)
        assert str(is_greedy) == str(expected_greedy)


def _transformers_loglikelihood(context: str, continuation: str) -> tuple[float, bool]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    # lm-eval encodes context and continuation together and splits after the context's own tokens.
    context_ids = tokenizer.encode(context, add_special_tokens=False)
    whole = tokenizer.encode(context + continuation, add_special_tokens=False)
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([whole])).logits[0].float(), dim=-1)
    targets = range(len(context_ids), len(whole))
    total = sum(float(logprobs[i - 1, whole[i]]) for i in targets)
    return total, all(int(logprobs[i - 1].argmax()) == whole[i] for i in targets)
