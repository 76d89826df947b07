"""vLLM's CPU build, asked through standard input: python vllm_worker.py WORKLOAD THREADS"""

import json
import os
import sys
import time
from typing import Any


def main(folder: str, threads: str) -> None:
    """Answer every line with the seconds it took, until there are no more."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": threads}
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    fixed: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 1024, "enforce_eager": True}
    fixed |= {"max_num_seqs": 32, "enable_prefix_caching": False}
    # Two engines: one that is ready for adapters computes the base more slowly.
    engines = {
        "base": LLM(f"{folder}/base", **fixed),
        "mixed": LLM(f"{folder}/base", enable_lora=True, max_loras=8, max_cpu_loras=8, max_lora_rank=16, **fixed),
    }
    print(json.dumps({"modes": list(engines)}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        count = task["new_tokens"]
        params = SamplingParams(max_tokens=count, min_tokens=count, temperature=0, ignore_eos=True, detokenize=False)
        requests = [LoRARequest(f"adapter{i}", i + 1, f"{folder}/adapter{i}") for i in task["adapters"]] or None
        prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
        started = time.perf_counter()
        engines["mixed" if requests else "base"].generate(prompts, params, lora_request=requests, use_tqdm=False)
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
