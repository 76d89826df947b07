"""Blocks of Llama's kind, computed by two calls of the kernels and the attention between them.

Left to torch, operators and graphs took a quarter of a step of 8 rows and a third of a step of one: interpreting, guards,
dispatch, and a parallel region for each. What is recognised is code of transformers that has been read, by its classes, with
sizes and parts checked; everything else, and steps with adapters that replace parameters, run the model's own code.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from service.engine.adapted import AdaptedModule, LoraStep, current_step
from service.engine.attention import Queries, current_attention
from service.engine.kv_cache import LayerShape, PagedAttention
from service.engine.merged import MergedWeights
from service.engine.mixed import MixedStep
from service.engine.model import LoadedModel
from service.engine.native.kernels import PANEL, Block, BlockShape, Kernels
from service.errors import ModelRefused

log = logging.getLogger(__name__)

_KINDS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


def use_native_blocks(loaded: LoadedModel, blocks: Iterable[Any], kernels: Kernels, check: Callable[[], None]) -> bool:
    """Let the kernels compute the blocks, once their weights are packed; False, and nothing is changed, if they can't.

    Args:
        check: raises ModelRefused if the model gives other logits than its own code: a class says nothing of what somebody has
            put into an object.
    """
    blocks = list(blocks)
    if not blocks or not all(_is_known(block) for block in blocks):
        return False
    rotary = _Rotary()
    for block in blocks:
        block.forward = NativeBlock(block, loaded.layers[block.self_attn], kernels, rotary)
    try:
        check()
    except ModelRefused as refused:
        log.warning("the kernels do not compute this model's blocks, which run by torch: %s", refused)
        for block in blocks:
            del block.forward
        return False
    return True


class _Rotary:
    """Cosines and sines of a step, which every block is given, as the kernels read them."""

    def __init__(self) -> None:
        self._given: tuple[Tensor, Tensor] | None = None
        self._read: tuple[Tensor, Tensor]

    def of(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[rows, dim] each, from [1, rows, dim]."""
        if self._given is not given:
            self._given, self._read = given, (given[0][0].contiguous(), given[1][0].contiguous())
        return self._read


class NativeBlock:
    """Stands for the `forward` of a block."""

    def __init__(self, block: Any, shape: LayerShape, kernels: Kernels, rotary: _Rotary) -> None:
        attention, mlp = block.self_attn, block.mlp
        self._kernels = kernels
        self._rotary = rotary
        self._own_forward = block.forward
        self._attention = attention
        self._window = shape.window
        self._linears = _linears(block)
        self._norms = [
            block.input_layernorm.weight,
            block.post_attention_layernorm.weight,
            *(norm.weight if (norm := getattr(attention, name, None)) is not None else None for name in ("q_norm", "k_norm")),
        ]
        self._shape = BlockShape(
            hidden=attention.q_proj.site.in_features,
            inner=mlp.gate_proj.site.out_features,
            heads=attention.q_proj.site.out_features // shape.head_dim,
            kv_heads=shape.kv_heads,
            dim=shape.head_dim,
            epsilon=block.input_layernorm.variance_epsilon,
        )
        self._layout = -1
        self._base: Block
        self._merged: WeakKeyDictionary[MergedWeights, Block] = WeakKeyDictionary()

    def __call__(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **others: Any) -> Tensor:
        """The block's output, [1, rows, hidden]."""
        step, attention = current_step(), current_attention()
        block, x = self._block(step), hidden_states[0].contiguous()
        if block is None or not isinstance(attention, PagedAttention) or not attention.is_native:
            out: Tensor = self._own_forward(hidden_states, position_embeddings=position_embeddings, **others)
            return out
        rows = step.rows(x.shape[0]) if isinstance(step, MixedStep) else None
        query = block.before_attention(x, *self._rotary.of(position_embeddings), rows, *attention.places(self._attention))
        queries = Queries(query.transpose(0, 1), self._attention.scaling, self._window)
        return block.after_attention(x, attention.attend_written(self._attention, queries), rows)[None]

    def _block(self, step: LoraStep | None) -> Block | None:
        """The block with the weights that the step runs with; None if the step asks for more than low-rank updates."""
        if isinstance(step, MergedWeights) and step.is_plain:
            if step not in self._merged:
                own = [step.parameters.get(linear.site.path, {}).get("weight") for linear in self._linears]
                self._merged[step] = self._lay_out(own)
            return self._merged[step]
        if step is not None and not (isinstance(step, MixedStep) and step.is_plain):
            return None
        layout = sum(linear.layout for linear in self._linears)
        if layout != self._layout:
            self._layout, self._base = layout, self._lay_out([None] * len(self._linears))
        return self._base

    def _lay_out(self, weights: Sequence[Tensor | None]) -> Block:
        """`weights` in the place of the base's own where there are any."""
        terms = [linear.term for linear in self._linears]
        terms = [term if weight is None else term._replace(weight=weight) for term, weight in zip(terms, weights, strict=True)]
        return self._kernels.block(self._shape, self._norms, terms)


def _linears(block: Any) -> list[AdaptedModule]:
    parts = [(block.self_attn, _ATTENTION_LINEARS), (block.mlp, _MLP_LINEARS)]
    return [getattr(part, name) for part, names in parts for name in names]


def _is_known(block: Any) -> bool:
    """Whether a block computes what the kernels compute."""
    if type(block) not in _KINDS or not isinstance(getattr(block.mlp, "act_fn", None), nn.Module):
        return False
    linears = _linears(block)
    if not all(isinstance(linear, AdaptedModule) and linear.site.kernels is not None for linear in linears):
        return False
    is_silu = type(block.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    adds_bias = any(linear.site.own[1] is not None for linear in (linears[3], linears[6]))
    return is_silu and not adds_bias and block.self_attn.head_dim % 2 == 0 and linears[0].site.in_features % PANEL == 0
