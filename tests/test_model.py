"""Which base models are served, and what those hear that are not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from adapters.adapter import Adapter
from adapters.config import AdapterConfig, AdapterKind
from adapters.errors import InvalidAdapter
from adapters.nesting import export_rank
from service.core import AdapterChoice, GenerationRequest, SamplingParams
from service.engine.engine import Engine
from service.engine.model import load_model, prepare_model
from service.errors import ModelRefused
from tests.engine_harness import character_tokenizer, generate, mixed_requests, random_dylora, running_engine
from tests.test_engine_invariance import stock_tokens
from tests.tiny_models import VOCAB, tiny_model

STORIES = Path(__file__).resolve().parent.parent.parent / "shared" / "models" / "stories260K"


def small_model(model_type: str, **fields: Any) -> PreTrainedModel:
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**common, **fields})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.train(False)


ALSO_SERVED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},  # soft-capped scores, every other layer slides
    "qwen3": {"head_dim": 8},  # norms on queries and keys
    "mixtral": {},  # experts
    "phi": {"num_key_value_heads": 4},  # partial rotary, parallel blocks
    "cohere": {},  # scaled logits
}


@pytest.mark.parametrize("model_type", ALSO_SERVED)
def test_other_kinds_give_transformers_own_tokens(model_type: str) -> None:
    prompt = tuple(range(20, 32))
    asked = GenerationRequest("r", prompt, SamplingParams(max_new_tokens=20, ignore_eos=True))
    expected = stock_tokens(small_model(model_type, **ALSO_SERVED[model_type]), asked)
    with running_engine(small_model(model_type, **ALSO_SERVED[model_type])) as engine:
        assert generate(engine, [asked])[0].tokens == expected


NOT_ROW_BY_ROW: dict[str, tuple[str, dict[str, Any]]] = {
    "model.decoder.embed_positions.weight": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),  # called by keyword
    "model.layers.1.self_attn.q_norm.weight": ("qwen3", {"head_dim": 8}),  # a row for each head
    "model.layers.0.mlp.gate.weight": ("mixtral", {}),  # returns more than its rows
    "model.layers.0.mlp.experts.down_proj": ("mixtral", {}),  # called with more than rows
}


@pytest.mark.parametrize("parameter", NOT_ROW_BY_ROW)
def test_an_adapter_of_what_is_not_computed_row_by_row_is_refused_and_the_base_goes_on(parameter: str) -> None:
    model_type, fields = NOT_ROW_BY_ROW[parameter]
    model = small_model(model_type, **fields)
    adapter = Adapter(
        AdapterConfig(AdapterKind.LORA, 4, 4.0), {}, saved_modules={parameter: model.get_parameter(parameter).detach() + 1}
    )
    asked = GenerationRequest("r", (5, 6, 7), SamplingParams(max_new_tokens=8, ignore_eos=True))
    with running_engine(model) as engine:
        before = generate(engine, [asked])[0].tokens
        with pytest.raises(InvalidAdapter, match=f"{parameter}: the base model does not compute it row by row"):
            engine.load("v", adapter)
        assert generate(engine, [asked])[0].tokens == before


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "alibi": ("bloom", {"n_head": 4, "n_layer": 2}, "does not call its attention through transformers' AttentionInterface"),
    "state space": ("mamba", {}, "does not call its attention through transformers' AttentionInterface"),
    "looks ahead": ("bert", {}, "gives other logits when rows of several requests are packed"),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "it mixes tokens outside its attention"),
    "sinks": ("gpt_oss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "its attention needs s_aux"),
    "dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "depends on the longest request in the batch",
    ),
    "chunked attention": ("llama4_text", {"attention_chunk_size": 64}, "max_context_tokens of at most 64"),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' advice about kernels that are not installed
def test_a_model_that_can_not_be_served_is_refused_with_the_reason(why: str) -> None:
    model_type, fields, reason = REFUSED[why]
    with pytest.raises(ModelRefused, match=reason):
        Engine(prepare_model(small_model(model_type, **fields), character_tokenizer(), name=model_type))


def test_a_shorter_context_makes_chunked_attention_harmless() -> None:
    model = small_model("llama4_text", attention_chunk_size=64)
    Engine(prepare_model(model, character_tokenizer(), name="llama4", max_context_tokens=64))


def test_a_context_beyond_the_models_positions_is_refused() -> None:
    with pytest.raises(ModelRefused, match="max_context_tokens is 257, its positions end at 256"):
        prepare_model(tiny_model("llama"), character_tokenizer(), name="tiny", max_context_tokens=257)


def save(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_folder_is_loaded_and_served(tmp_path: Path) -> None:
    loaded = load_model(save(tiny_model("gpt2"), tmp_path), display_name="mine")
    assert (loaded.facts.name, loaded.facts.model_type, loaded.facts.max_context_tokens) == ("mine", "gpt2", 256)
    Engine(loaded)


def test_what_is_no_causal_model_or_no_safetensors_is_refused(tmp_path: Path) -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ModelRefused, match="encoder-decoder"):
        load_model(save(t5, tmp_path / "t5"))
    folder = Path(save(tiny_model("llama"), tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelRefused, match="safetensors"):
        load_model(str(folder))
    with pytest.raises(ModelRefused, match="could not be loaded"):
        load_model(str(tmp_path / "nothing here"))


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    folder = Path(save(tiny_model("llama"), tmp_path))
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if "q_proj" not in name}, weights, metadata={"format": "pt"})
    with pytest.raises(ModelRefused, match=r"files lack these weights, .* model\.layers\.0\.self_attn\.q_proj\.weight, model"):
        load_model(str(folder))
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ModelRefused, match=r"could not be loaded: .*file not fully covered"):
        load_model(str(folder))


@pytest.mark.skipif(not STORIES.is_dir(), reason="the genuine small model is not beside this checkout")
def test_a_genuine_model_gives_transformers_and_pefts_tokens_at_every_rank(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    adapters = {f"v{seed}": random_dylora("llama", model, seed=seed, r_max=16, alpha=0.5) for seed in range(4)}
    requests = mixed_requests(adapters, ranks=(1, 4, 8, 16), new_tokens=24, ignore_eos=False)
    with running_engine(model, adapters) as engine:
        together = [client.tokens for client in generate(engine, requests)]
    stock: dict[AdapterChoice | None, PreTrainedModel] = {None: AutoModelForCausalLM.from_pretrained(STORIES)}
    for number, (request, tokens) in enumerate(zip(requests, together, strict=True)):
        choice = request.adapter
        if choice is not None and choice not in stock:
            export_rank(adapters[choice.version], choice.rank, tmp_path / str(number))
            stock[choice] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(STORIES), tmp_path / str(number))
        assert stock_tokens(stock[choice], request) == tokens, f"request {number}: {choice}"
