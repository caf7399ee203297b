"""Worker: llama.cpp through llama-cpp-python's low-level interface, greedy; all streams in one llama_batch.

Also makes the GGUF file: bf16 from a transformers folder, then llama.cpp's own quantizer to Q4_0.
"""

import ctypes
import json
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray
from protocol import Stopwatch, serve, versions

BATCH = 512
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def prepare(folder: str, out: str, threads: int) -> dict[str, Any]:
    """``folder`` (bf16 Llama) as Q4_0 at ``out``."""
    whole = Path(out).with_suffix(".bf16.gguf")
    write_bf16(Path(folder), whole)
    partial = Path(out).with_suffix(".partial.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.nthread = threads
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(partial).encode(), params) != 0:
        raise SystemExit(f"llama.cpp did not quantize {whole}")
    whole.unlink()
    partial.rename(out)
    return {}


def write_bf16(folder: Path, out: Path) -> None:
    """GGUF of a Llama folder, without a vocabulary: the benchmark sends token ids."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in bf16_tensors(folder / "model.safetensors"):
        module = name.removesuffix(".weight")
        if module.endswith("q_proj"):
            tensor = interleave(tensor, heads)
        elif module.endswith("k_proj"):
            tensor = interleave(tensor, kv_heads)
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(module), (tensor.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(tensor).view(np.uint8)
            writer.add_tensor(gguf_name(module), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bf16_tensors(path: Path) -> list[tuple[str, NDArray[np.uint16]]]:
    """Every tensor of a safetensors file of bf16 only, as bit patterns over the mapped file."""
    data = np.memmap(path, np.uint8, "r")
    header_bytes = int(data[:8].view(np.uint64)[0])
    header = json.loads(data[8 : 8 + header_bytes].tobytes())
    found = []
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["dtype"] == "BF16"
            start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])
            found.append((name, data[start:stop].view(np.uint16).reshape(entry["shape"])))
    return found


def interleave(weight: NDArray[np.uint16], heads: int) -> NDArray[np.uint16]:
    """Rows of q or k from transformers' order (halves of a head) to llama.cpp's (pairs)."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def gguf_name(module: str) -> str:
    """llama.cpp's name of a module's weight."""
    if module in TOP:
        return f"{TOP[module]}.weight"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}.weight"


class LlamaCpp:
    """The operations."""

    def __init__(self) -> None:
        self._log: list[str] = []
        # ctypes callbacks must outlive their use.
        self._callback = llama_cpp.llama_log_callback(
            lambda _level, text, _data: self._log.append(text.decode(errors="replace").strip())
        )
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def load(
        self, model: str, threads: int, context: int, streams: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        """KV (fp16) for ``streams`` of ``context`` tokens. ``options``: unified, whether they share one.

        Without mmap: weights that llama.cpp repacks would count twice, as the file's pages too (1 B shape,
        0.3.36: 1,405 MB of PSS against 872).
        """
        model_params = llama_cpp.llama_model_default_params()
        if hasattr(model_params, "load_mode"):
            model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        else:  # before load_mode
            model_params.use_mmap = False
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = streams * context
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = streams
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = options["unified"]
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp: no context for {model}\n" + "\n".join(self._log))
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(model).tensors}
        tied = "output.weight" not in types
        return {
            "head": f"{'tied ' if tied else ''}{types['token_embd.weight' if tied else 'output.weight']}",
            "weights": types["blk.0.ffn_up.weight"],
            "bytes_per_token": int(llama_cpp.llama_model_size(self._model)),
            "features": llama_cpp.llama_print_system_info().decode(),
            "log": [line for line in self._log if "buffer size" in line],
            "versions": versions("llama_cpp_python"),
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """All prompts at once to ``new_tokens`` tokens each."""
        llama_cpp.llama_memory_clear(self._memory, True)
        watch = Stopwatch(len(prompts))
        rows = [
            (token, position, stream, position == len(prompt) - 1)
            for stream, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(rows), BATCH):
            watch.step(self._decode(rows[start : start + BATCH]))
        for step in range(1, new_tokens):
            watch.step(
                self._decode(
                    [
                        (watch.tokens[stream][-1], len(prompt) + step - 1, stream, True)
                        for stream, prompt in enumerate(prompts)
                    ]
                )
            )
        return watch.result()

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """One llama_decode of (token, position, stream, wants logits); (stream, most likely token)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, stream, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = stream
            batch.logits[index] = wanted
        if (code := llama_cpp.llama_decode(self._context, batch)) != 0:
            raise SystemExit(f"llama_decode: {code}")
        found = []
        for index, (_, _, stream, wanted) in enumerate(rows):
            if wanted:
                logits = llama_cpp.llama_get_logits_ith(self._context, index)
                found.append((stream, int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())))
        return found


if __name__ == "__main__":
    llama = LlamaCpp()
    serve(prepare=prepare, load=llama.load, generate=llama.generate)
