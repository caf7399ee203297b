"""Worker: Nybble's whole engine (scheduler, runner, sampler), greedy, in one process."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from nybble.engine.build import build_engine
from nybble.engine.config import EngineConfig
from nybble.engine.engine import Engine
from nybble.engine.records import EngineRequest, SamplingParams
from protocol import Stopwatch, serve, versions


class Ours:
    """The operations."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._lag = 0
        self._next_id = 0

    def load(
        self, model: str, threads: int, context: int, streams: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        """``options``: further fields of EngineConfig. KV for ``streams`` of ``context`` tokens."""
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        missing = sorted(set(options) - known)
        if missing:
            raise SystemExit(f"this engine has no option {', '.join(missing)}")
        config = EngineConfig(
            model,
            device="cpu",
            max_model_len=context,
            max_num_seqs=streams,
            num_threads=threads,
            enable_prefix_caching=False,
            **options,
        )
        log: list[str] = []
        self._engine, info = build_engine(config, lambda _p, _d, _t, line: log.append(line))
        self._lag = config.lag
        capacity = info.num_kv_blocks * info.block_size
        if capacity != streams * -(-context // info.block_size) * info.block_size:
            raise SystemExit(
                f"KV cache of {capacity} tokens instead of {streams} x {context}: too little memory"
            )
        head, table_bytes = head_of(Path(model), options.get("lm_head_bits"))
        return {
            "head": head,
            "weights": f"{info.bits}-bit g{info.group_size}, {options['cpu_activations']} activations",
            # The engine counts table and head apart, though a tied dense head lends its weights to both.
            "bytes_per_token": info.weight_bytes - table_bytes,
            "kv_bytes": info.kv_bytes,
            "load_seconds": info.load_seconds,
            "features": info.cpu_features,
            "log": [line for line in log if line],
            "versions": versions("torch", "numba"),
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """All prompts at once to ``new_tokens`` tokens each."""
        engine = self._engine
        assert engine is not None
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        base = self._next_id
        self._next_id += len(prompts)
        watch = Stopwatch(len(prompts))
        for index, prompt in enumerate(prompts):
            engine.add(EngineRequest(base + index, prompt, params))
        while engine.has_work:
            outputs = engine.step()
            watch.step((o.request_id - base, token) for o in outputs for token in o.token_ids)
        assert all(len(tokens) == new_tokens for tokens in watch.tokens)
        return watch.result(skip_last=self._lag > 0)


def head_of(folder: Path, bits: int | None) -> tuple[str, int]:
    """The output head in words, its bytes, and those of an embedding that a token does not read whole."""
    config = json.loads((folder / "config.json").read_text())
    weights = config["vocab_size"] * config["hidden_size"]
    dtype = getattr(torch, config.get("dtype") or config["torch_dtype"])
    table = weights * dtype.itemsize
    tied = "tied " if config["tie_word_embeddings"] else ""
    if bits is None:
        return f"{tied}{str(dtype).removeprefix('torch.')}, as stored", table
    return f"{tied}{bits}-bit (--lm-head-bits {bits})", table


if __name__ == "__main__":
    ours = Ours()
    serve(load=ours.load, generate=ours.generate)
