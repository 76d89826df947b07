"""The token that batches are padded with: a decoder's classifier reads the last token that is another one."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters.errors import AdapterError
from adapters.training.heads import is_classifier


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a classifier and its tokenizer a padding token where they have none: the same one wherever the model is loaded.

    It is the other's, or else the token that ends a text.

    Raises:
        AdapterError: a classifier for which there is none.
    """
    if not is_classifier(model):
        return
    config = model.config.get_text_config()
    pads = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((pad for pad in pads if pad is not None), None)
    config.pad_token_id = pad
    pad = padding_id(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)


def padding_id(model: PreTrainedModel) -> int:
    """The token to pad with; of a causal model any will do, since its padding is masked everywhere.

    Raises:
        AdapterError: a classifier has none.
    """
    pad = model.config.get_text_config().pad_token_id
    if isinstance(pad, int):
        return pad
    if is_classifier(model):
        raise AdapterError(
            f"{type(model).__name__}: neither its config nor its tokenizer names a padding token or one that ends a text, "
            "and a classifier needs one: set pad_token_id in its config.json"
        )
    return 0
