"""How long an input a model and its tokenizer take."""

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def max_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The longest input that both take; None where neither has a limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for path, module in model.named_modules():
        # RoBERTa and its kin count positions from the padding's on.
        if isinstance(positions, int) and path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            positions -= 0 if module.padding_idx is None else module.padding_idx + 1
    limits = [limit for limit in (positions, tokenizer.model_max_length) if isinstance(limit, int) and 0 < limit < 1 << 30]
    return min(limits, default=None)
