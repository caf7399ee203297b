"""Worker: onnxruntime-genai, int4 in blocks of 32, greedy; all streams as one batch.

Also makes the ONNX model with its own builder.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as og
from protocol import Stopwatch, serve, versions

CHUNK = 512  # tokens appended at once


def prepare(folder: str, out: str, threads: int) -> dict[str, Any]:
    """``folder`` (bf16 Llama) as int4, accuracy level 4 (int8 activations), at ``out``."""
    with tempfile.TemporaryDirectory(dir=Path(out).parent) as work:
        made = Path(work) / "model"
        options = ["int4_block_size=32", "int4_accuracy_level=4"]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", str(made)]
        command += ["-p", "int4", "-e", "cpu", "-c", str(Path(work) / "cache"), "--extra_options", *options]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        shutil.move(made, out)
    return {}


def describe(folder: Path) -> tuple[str, str, int]:
    """The head and the linears in words, and the bytes of weights that one token reads."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    sizes = {
        tensor.name: int(np.prod(tensor.dims))
        * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
        for tensor in graph.initializer
    }
    found: dict[str, str] = {}
    total = 0
    for node in graph.node:
        if node.op_type in ("MatMulNBits", "MatMul"):
            total += sum(sizes.get(name, 0) for name in node.input)
            values = {attribute.name: attribute.i for attribute in node.attribute}
            text = f"{values['bits']}-bit g{values['block_size']}" if "bits" in values else "float"
            found["head" if "lm_head" in node.name else "linear"] = text
    return found["head"], found["linear"], total


class OrtGenAI:
    """The operations."""

    def load(
        self, model: str, threads: int, context: int, streams: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        """KV for ``context`` tokens a stream (taken by each generation for its own streams)."""
        assert not options
        self._context, self._streams = context, streams
        config = og.Config(model)
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = og.Model(config)
        self._generator: og.Generator | None = None
        head, linear, num_bytes = describe(Path(model))
        return {
            "head": head,
            "weights": linear,
            "bytes_per_token": num_bytes,
            "features": "its own detection",
            "versions": versions("onnxruntime", "onnxruntime_genai"),
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """All prompts (of equal length) at once to ``new_tokens`` tokens each.

        The generator, with its KV cache, is made before the clock starts and kept until the next call.
        """
        self._generator = None
        batch = len(prompts)
        params = og.GeneratorParams(self._model)
        params.set_search_options(
            max_length=self._context, min_length=self._context, batch_size=batch, do_sample=False
        )
        self._generator = generator = og.Generator(self._model, params)
        tokens = np.array(prompts, np.int32)
        # A generator takes more tokens later for a single sequence only.
        chunk = CHUNK if batch == 1 else tokens.shape[1]
        watch = Stopwatch(batch)
        for start in range(0, tokens.shape[1], chunk):
            generator.append_tokens(np.ascontiguousarray(tokens[:, start : start + chunk]))
        for _ in range(new_tokens):
            generator.generate_next_token()
            watch.step(enumerate(generator.get_next_tokens()))
        return watch.result()


if __name__ == "__main__":
    ort = OrtGenAI()
    serve(prepare=prepare, load=ort.load, generate=ort.generate)
