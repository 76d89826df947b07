"""Loading a base model, and finding out whether packed rows can serve it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from adapters.pretrained_model import LOADING_ERRORS, first_line, load_config, load_pretrained, load_tokenizer
from service.core import ModelFacts
from service.engine.attention import ATTENTION, AttentionCall, UnsupportedAttention, attention_step
from service.engine.kv_cache import LayerShape
from service.engine.sites import SiteKind, site_kind
from service.errors import ModelRefused

_DYNAMIC_ROPE = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose frequencies depend on the longest row of the batch: one request would change another's answer."""
_TRIAL_ROWS = 16
"""Of the forward pass that layers and modules are learned from: so many that the tokens of no expert are all of them."""
_MAX_TOLD = 5
"""Names of weights in a message."""


@dataclass(frozen=True)
class LoadedModel:
    """A base model ready to serve.

    Attributes:
        layers: its attention modules in the order they run, with their shapes.
        adaptable: paths of the modules that adapters can change: they compute one row for each token, from that alone.
        eos_ids: tokens that end a generation.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: dict[nn.Module, LayerShape]
    adaptable: frozenset[str]
    eos_ids: frozenset[int]
    max_context_tokens: int

    @property
    def facts(self) -> ModelFacts:
        """What HTTP tells of it."""
        config = self.model.config
        return ModelFacts(
            name=self.name,
            model_type=config.model_type,
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=str(self.model.device),
            parameters=self.model.num_parameters(),
            nbytes=sum(parameter.nbytes for parameter in self.model.parameters()),
            vocab_size=config.get_text_config().vocab_size,
            max_context_tokens=self.max_context_tokens,
        )


def load_model(
    name: str,
    *,
    display_name: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: str = "cpu",
    max_context_tokens: int | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer from a local folder or by hub name, and check that it can be served.

    Only safetensors weights are read, and no code that comes with a model is run.

    Raises:
        ModelRefused: with every reason found.
    """
    shown = display_name or name
    try:
        config = load_config(name, revision)
        reasons = _config_reasons(config)
        if reasons:
            raise ModelRefused(shown, reasons)
        tokenizer = load_tokenizer(name, revision)
        loaded = load_pretrained(
            AutoModelForCausalLM,
            name,
            revision=revision,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=ATTENTION,
        )
    except LOADING_ERRORS as error:
        raise ModelRefused(shown, [f"it could not be loaded: {first_line(error)}"]) from error
    if loaded.random:
        names = ", ".join(loaded.random[:_MAX_TOLD]) + (", ..." if len(loaded.random) > _MAX_TOLD else "")
        raise ModelRefused(shown, [f"its files lack these weights, or have them in another shape: {names}"])
    loaded.model.to(device)
    return prepare_model(loaded.model, tokenizer, name=shown, max_context_tokens=max_context_tokens)


def prepare_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_context_tokens: int | None = None,
) -> LoadedModel:
    """Check a model that is in memory and learn the shapes of its attention layers.

    Raises:
        ModelRefused: with every reason found.
    """
    reasons = _config_reasons(model.config)
    limit = context_limit(model.config)
    if max_context_tokens is not None and limit is not None and max_context_tokens > limit:
        reasons.append(f"max_context_tokens is {max_context_tokens}, its positions end at {limit}")
    if reasons:
        raise ModelRefused(name, reasons)
    model.train(False).requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    context = max_context_tokens or limit or 4096
    found = _discover(model, name, rows=min(_TRIAL_ROWS, context))
    reasons = _mask_reasons(model.config.get_text_config(), found.layers, context)
    if reasons:
        raise ModelRefused(name, reasons)
    return LoadedModel(name, model, tokenizer, found.layers, found.adaptable, _eos_ids(model, tokenizer), context)


def context_limit(config: Any) -> int | None:
    """Positions that the model knows, if its config says; None where it has no limit of its own."""
    text = config.get_text_config()
    for field in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _config_reasons(config: Any) -> list[str]:
    reasons = []
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("it is an encoder-decoder; only decoder-only causal language models are served")
    architectures = getattr(config, "architectures", None) or []
    if architectures and not any(
        "CausalLM" in each or "LMHead" in each or "ConditionalGeneration" in each for each in architectures
    ):
        reasons.append(f"its architecture {', '.join(architectures)} is not a causal language model")
    if getattr(config, "quantization_config", None) is not None:
        reasons.append("its weights are quantised, which this version does not serve")
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    scalings = rope.values() if all(isinstance(value, dict) for value in rope.values()) and rope else [rope]
    dynamic = sorted({str(each.get("rope_type")) for each in scalings} & _DYNAMIC_ROPE)
    if dynamic:
        reasons.append(f"its {', '.join(dynamic)} rotary embedding depends on the longest request in the batch")
    return reasons


def _mask_reasons(config: Any, layers: dict[nn.Module, LayerShape], context: int) -> list[str]:
    """Restrictions that transformers would put into the mask, which packed rows do not have, and that bite here."""
    reasons = []
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and chunk < context:
        reasons.append(f"its attention works in chunks of {chunk} tokens; max_context_tokens of at most {chunk} is served")
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is not None and window < context and kinds is not None:
        told, expected = sum(shape.window is not None for shape in layers.values()), kinds.count("sliding_attention")
        if told != expected:
            reasons.append(
                f"{expected} of its layers have a sliding window of {window} tokens, and only {told} tell their attention;"
                f" max_context_tokens of at most {window} is served"
            )
    return reasons


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    for given in (getattr(generation, "eos_token_id", None), model.config.eos_token_id, tokenizer.eos_token_id):
        if given is not None:
            return frozenset(given if isinstance(given, list) else [given])
    return frozenset()


class _Discovery:
    """Learns, during one forward pass of so many rows, which attention layers run and with which shapes, and which modules
    are called as one is that stands in the place of a module and changes each row by itself: see `AdaptedModule`.
    """

    def __init__(self, rows: int) -> None:
        self.layers: dict[nn.Module, LayerShape] = {}
        self._rows = rows
        self._is_adaptable: dict[str, bool] = {}  # by path, of those that were called

    @property
    def adaptable(self) -> frozenset[str]:
        """Paths of the modules that were called so, each time."""
        return frozenset(path for path, is_adaptable in self._is_adaptable.items() if is_adaptable)

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        self.layers[module] = LayerShape(call.key.shape[0], call.key.shape[-1], call.value.shape[-1], call.window)
        heads, rows, _ = call.query.shape
        return call.query.new_zeros(rows, heads, call.value.shape[-1])

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """See, inside the block, how the modules are called that have a weight of their own."""
        owners = [(path, module) for path, module in model.named_modules() if module._parameters.get("weight") is not None]
        hooks = [module.register_forward_hook(partial(self._see, path), with_kwargs=True) for path, module in owners]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, path: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        is_adaptable = len(given) == 1 and not named and isinstance(given[0], Tensor) and isinstance(out, Tensor)
        if is_adaptable:
            x_rows = given[0].shape if site_kind(module) is SiteKind.EMBEDDING else given[0].shape[:-1]
            is_adaptable = x_rows.numel() == out.shape[:-1].numel() == self._rows
        self._is_adaptable[path] = self._is_adaptable.get(path, True) and is_adaptable


def _discover(model: PreTrainedModel, name: str, *, rows: int) -> _Discovery:
    discovery = _Discovery(rows)
    every = torch.arange(rows, device=model.device)
    # Tokens that differ, which experts share among them, and the logits of all: else one row could stand for any other.
    ids = every * model.config.get_text_config().vocab_size // rows
    try:
        with torch.inference_mode(), attention_step(discovery), discovery.watching(model):
            model(input_ids=ids[None], position_ids=every[None], use_cache=False, logits_to_keep=every)
    except (UnsupportedAttention, TypeError, ValueError, RuntimeError, LookupError) as error:
        raise ModelRefused(name, [f"{type(model).__name__} can't run packed rows: {first_line(error)}"]) from error
    if not discovery.layers:
        raise ModelRefused(
            name, [f"{type(model).__name__} does not call its attention through transformers' AttentionInterface"]
        )
    return discovery
