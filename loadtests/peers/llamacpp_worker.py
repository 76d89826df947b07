"""llama.cpp in float32, asked through standard input: python llamacpp_worker.py WORKLOAD THREADS

Base only: llama.cpp never mixes adapters in one batch. It is fed random next tokens in the place of sampled ones, which spares
it the sampling.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]
import llama_cpp  # type: ignore[import-not-found]
import numpy as np
from safetensors.numpy import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_CONTEXT_TOKENS = 128
_MOST_SEQUENCES = 32


def write_gguf(base: Path, out: Path) -> None:
    """The checkpoint of `base`, a Llama, in llama.cpp's format."""
    config = json.loads((base / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    weights = load_file(base / "model.safetensors")
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in _NAMES.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                weight = _interleaved(weight, heads if ours == "attn_q" else kv_heads)
            writer.add_tensor(f"blk.{layer}.{ours}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Any, heads: int) -> Any:
    """Rotary pairs side by side, from Hugging Face's two halves; [out, in]."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


class Model:
    """One context of llama.cpp."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = _MOST_SEQUENCES * _CONTEXT_TOKENS, _MOST_SEQUENCES
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, params)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Prefill all prompts, then decode all rows together."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._decode([(t, at, s, at == len(ids) - 1) for s, ids in enumerate(prompts) for at, t in enumerate(ids)])
        for step in range(new_tokens - 1):
            self._decode([(random.randint(5, 30000), len(ids) + step, s, True) for s, ids in enumerate(prompts)])

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wants_logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wants_logits
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")


def main(folder: str, threads: str) -> None:
    """Answer every line with the seconds it took, until there are no more."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "base.gguf"
        write_gguf(Path(folder) / "base", path)
        model = Model(path, int(threads))
        print(json.dumps({"modes": ["base"]}), flush=True)
        for line in sys.stdin:
            task = json.loads(line)
            started = time.perf_counter()
            model.generate(task["prompts"], task["new_tokens"])
            print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
