"""Models of Llama's kind, whose blocks the kernels compute, all of a step in one call.

Left to torch, operators and graphs took a quarter of a step of 8 rows and a third of a step of one: interpreting, guards,
dispatch, and a parallel region for each. What is recognised is code of transformers that has been read, by its classes, with
sizes and parts checked; everything else, and steps with adapters that replace parameters, run the model's own code.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model

from service.engine.adapted import AdaptedModule, LoraStep, current_step
from service.engine.attention import current_attention
from service.engine.kv_cache import LayerShape, NativeAttention
from service.engine.merged import MergedWeights
from service.engine.mixed import MixedStep
from service.engine.model import LoadedModel
from service.engine.native.block import Block, Blocks, BlockShape, BlockStep
from service.engine.native.kernels import PANEL, Kernels
from service.errors import ModelRefused

log = logging.getLogger(__name__)

_KINDS = {
    LlamaForCausalLM: (LlamaModel, LlamaDecoderLayer),
    MistralForCausalLM: (MistralModel, MistralDecoderLayer),
    Qwen2ForCausalLM: (Qwen2Model, Qwen2DecoderLayer),
    Qwen3ForCausalLM: (Qwen3Model, Qwen3DecoderLayer),
}
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")

_Caches = Mapping[nn.Module, tuple[Tensor, Tensor]]


def use_native_blocks(loaded: LoadedModel, kernels: Kernels, check: Callable[[], None]) -> bool:
    """Let the kernels compute the blocks, once their weights are packed; False, and nothing is changed, if they can't.

    Args:
        check: raises ModelRefused if the model gives other logits than its own code: a class says nothing of what somebody has
            put into an object.
    """
    model = loaded.model
    decoder = model.base_model
    kinds = _KINDS.get(type(model))
    if kinds is None or type(decoder) is not kinds[0]:
        return False
    if not all(type(block) is kinds[1] and _is_known(block) for block in decoder.layers):
        return False
    model.forward = NativeModel(model, loaded.layers, kernels)
    try:
        check()
    except ModelRefused as refused:
        log.warning("the kernels do not compute this model's blocks, which run by torch: %s", refused)
        del model.forward
        return False
    return True


class Logits(NamedTuple):
    """What a model returns, as far as it is asked for."""

    logits: Tensor  # [1, rows, vocabulary]


class NativeModel:
    """Stands for the `forward` of a model."""

    def __init__(self, model: Any, layers: Mapping[nn.Module, LayerShape], kernels: Kernels) -> None:
        self._decoder = decoder = model.base_model
        self._model = model
        self._kernels = kernels
        self._own_forward = model.forward
        self._attentions = [block.self_attn for block in decoder.layers]
        self._shapes = [_shape(block, layers[block.self_attn]) for block in decoder.layers]
        self._linears = [_linears(block) for block in decoder.layers]
        self._norms = [_norms(block) for block in decoder.layers]
        self._norm = decoder.norm.weight
        self._rotary = RotaryTable(decoder.rotary_emb)
        self._laid_out: tuple[int, _Caches | None] = (-1, None)
        self._base: Blocks
        self._merged: WeakKeyDictionary[MergedWeights, Blocks] = WeakKeyDictionary()

    def __call__(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor, **others: Any) -> Any:
        """Logits of the rows `logits_to_keep` [kept], of input_ids and position_ids [1, rows]."""
        step, attention = current_step(), current_attention()
        native = attention if isinstance(attention, NativeAttention) else None
        blocks = None if native is None else self._blocks(step, native.layers)
        if native is None or blocks is None:
            return self._own_forward(input_ids=input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, **others)
        x = self._decoder.embed_tokens(input_ids)[0].contiguous()  # [rows, hidden]
        rows = step.rows(len(x)) if isinstance(step, MixedStep) else None
        common = BlockStep(*self._rotary.up_to(native.end), position_ids, rows, native.slots)
        blocks.run(x, common, native.seen)
        kept = x if len(logits_to_keep) == len(x) else x[logits_to_keep]  # ascending, so all of them are as they stand
        return Logits(self._model.lm_head(kept[None]))

    def _blocks(self, step: LoraStep | None, caches: _Caches) -> Blocks | None:
        """Those with the weights that the step runs with; None if it asks for more than low-rank updates."""
        if step is not None and not (isinstance(step, MixedStep | MergedWeights) and step.is_plain):
            return None
        layout = sum(linear.layout for linears in self._linears for linear in linears)
        if self._laid_out[0] != layout or self._laid_out[1] is not caches:
            self._laid_out = layout, caches
            self._base = self._lay_out(caches, {})
            self._merged.clear()
        if not isinstance(step, MergedWeights):
            return self._base
        if step not in self._merged:
            self._merged[step] = self._lay_out(caches, step.parameters)
        return self._merged[step]

    def _lay_out(self, caches: _Caches, merged: Mapping[str, Mapping[str, Tensor]]) -> Blocks:
        """With merged weights in the place of the base's own where there are any."""
        blocks = []
        for attention, shape, linears, norms in zip(self._attentions, self._shapes, self._linears, self._norms, strict=True):
            own = [(linear.term, merged.get(linear.site.path, {}).get("weight")) for linear in linears]
            terms = [term if weight is None else term._replace(weight=weight) for term, weight in own]
            blocks.append(Block(shape, norms, terms, caches[attention]))
        return Blocks(self._kernels, blocks, self._norm)


class RotaryTable:
    """A rotary embedding's cosines and sines by position, which the model computes anew for each step."""

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._cos = self._sin = torch.empty(0)

    def up_to(self, end: int) -> tuple[Tensor, Tensor]:
        """Of at least the positions before `end`, [positions, dim]."""
        if len(self._cos) < end:
            positions = torch.arange(1 << (end - 1).bit_length())
            cos, sin = self._rotary(torch.empty(0), positions[None])
            self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()
        return self._cos, self._sin


def _shape(block: Any, layer: LayerShape) -> BlockShape:
    attention = block.self_attn
    return BlockShape(
        hidden=attention.q_proj.site.in_features,
        inner=block.mlp.gate_proj.site.out_features,
        heads=attention.q_proj.site.out_features // layer.head_dim,
        kv_heads=layer.kv_heads,
        dim=layer.head_dim,
        window=layer.window,
        scale=attention.scaling,
        epsilon=block.input_layernorm.variance_epsilon,
    )


def _norms(block: Any) -> list[Tensor | None]:
    """Weights of the norms of the input, of the attention's output, and of heads where those have norms."""
    of_heads = [getattr(block.self_attn, name, None) for name in ("q_norm", "k_norm")]
    own = [block.input_layernorm, block.post_attention_layernorm, *of_heads]
    return [None if norm is None else norm.weight for norm in own]


def _linears(block: Any) -> list[AdaptedModule]:
    parts = [(block.self_attn, _ATTENTION_LINEARS), (block.mlp, _MLP_LINEARS)]
    return [getattr(part, name) for part, names in parts for name in names]


def _is_known(block: Any) -> bool:
    """Whether a block computes what the kernels compute."""
    if not isinstance(getattr(block.mlp, "act_fn", None), nn.Module):
        return False
    linears = _linears(block)
    if not all(isinstance(linear, AdaptedModule) and linear.site.kernels is not None for linear in linears):
        return False
    is_silu = type(block.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    adds_bias = any(linear.site.own[1] is not None for linear in (linears[3], linears[6]))
    return is_silu and not adds_bias and block.self_attn.head_dim % 2 == 0 and linears[0].site.in_features % PANEL == 0
