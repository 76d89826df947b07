"""A model made ready to run: its cache, its weights as the backend wants them, and the proof that it still gives its own
answers.
"""

import logging
from dataclasses import dataclass
from functools import partial

from service.core import Compile, ModelFacts
from service.engine.attention import number_layers
from service.engine.backend import Backend
from service.engine.blocks import BlockPool
from service.engine.compiled import CompiledBlocks, blocks_of, wants_compilation
from service.engine.kv_cache import CacheRoom, KVCache
from service.engine.lora import LoraBank
from service.engine.model import LoadedModel
from service.engine.model_check import Reference
from service.engine.native_blocks import use_native_blocks
from service.engine.options import EngineOptions
from service.engine.runner import Runner
from service.errors import ModelRefused

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadyModel:
    """What the engine's thread runs steps with; `facts` are of the model as it came."""

    pool: BlockPool
    runner: Runner
    bank: LoraBank
    facts: ModelFacts


def make_ready(loaded: LoadedModel, options: EngineOptions, backend: Backend) -> ReadyModel:
    """Reserve the cache, pack the weights, compile what is to be compiled, and check the model after each.

    Raises:
        ModelRefused: packed rows do not give the model's own answers, or the cache can't hold those that prove it.
    """
    model = loaded.model
    facts, reference = loaded.facts, Reference(loaded)  # both from the model as it came: packing unties weights
    pool = BlockPool(_blocks(loaded, options, reference.blocks(options.kv_block_tokens)), options.kv_block_tokens)
    cache = backend.cache(CacheRoom(loaded.layers, pool.total, pool.block_tokens, model.dtype, model.device))
    graphs = backend.graphs(loaded, most_rows=options.max_running)
    runner = Runner(loaded, cache, backend.kernels, graphs)
    bank = LoraBank(
        model, model.get_input_embeddings(), adaptable=loaded.adaptable, kernels=backend.kernels, product=backend.product
    )
    check = partial(reference.check, loaded, runner, block_tokens=pool.block_tokens)
    check()
    kernels = backend.kernels if options.compile is Compile.AUTO else None
    if kernels is not None and use_native_blocks(loaded, kernels, check):
        log.info("the blocks of %s run in the kernels", type(model).__name__)
    elif wants_compilation(options.compile, loaded):
        bank.adapt_linear(blocks_of(loaded))
        number_layers(loaded.layers)
        with CompiledBlocks(loaded):
            check()
    return ReadyModel(pool, runner, bank, facts)


def _blocks(loaded: LoadedModel, options: EngineOptions, least: int) -> int:
    """As many as may be taken, or as are ever needed; the check needs `least`."""
    block_bytes = KVCache.token_bytes(loaded.layers, loaded.model.dtype) * options.kv_block_tokens
    most = options.max_running * -(-loaded.max_context_tokens // options.kv_block_tokens)
    allowed = options.kv_cache_bytes // block_bytes
    if allowed < least:
        needed = f"{least * block_bytes} or more, for {least} blocks of {options.kv_block_tokens} tokens (kv_block_tokens)"
        raise ModelRefused(loaded.name, [f"kv_cache_bytes is {options.kv_cache_bytes}; legal: {needed}"])
    return min(allowed, max(most, least))
