"""What an engine is told when it is made."""

from dataclasses import dataclass

from service.core import Compile


@dataclass(frozen=True)
class EngineOptions:
    """Sizes and limits of an engine.

    Attributes:
        max_running: sequences that run side by side.
        max_waiting: requests that may queue behind them.
        max_batch_tokens: tokens of one step, decode rows and prefill chunks together.
        prefill_chunk_tokens: tokens of a prompt that enters alone, in a step that also has decode rows, whose next tokens wait
            for them, and one more for each of those; more where several enter, by `service.prefill`. The default was chosen on
            a CPU with a Llama of 100M parameters in fp32 and 8 rows that generate while 1,500 tokens enter: with 4, 6 and 8 the
            prompt took 6.4, 5.8 and 5.2 s, and one gap in a hundred was 2.24, 2.25 and 2.71 times as long as without it.
        prefix_cache: reuse the keys and values of prompts that begin alike, at the same adapter and rank. Who can time
            answers can tell whether a prompt was asked before; tenants who must not know that of each other need it off.
        merge_after_steps: consecutive steps of one (adapter, rank) before its weights are merged.
        compile: whether to make machine code for this processor.
    """

    max_running: int = 64
    max_waiting: int = 256
    max_batch_tokens: int = 512
    prefill_chunk_tokens: int = 6
    kv_cache_bytes: int = 512 << 20
    kv_block_tokens: int = 16
    prefix_cache: bool = True
    merged_cache_bytes: int = 512 << 20
    merge_after_steps: int = 8
    compile: Compile = Compile.AUTO
