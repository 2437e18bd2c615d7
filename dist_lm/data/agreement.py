"""Refuse inputs whose tokens are not those of the model that a run starts from."""

from dist_lm.config import Config
from dist_lm.data.prepared.found import prepared_folders
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_of
from dist_lm.data.tokenizer_training import is_trained_spec, train_tokenizer
from dist_lm.errors import UserError
from dist_lm.pretrained import Pretrained, find_model


def refuse_other_tokenizers(config: Config) -> None:
    """Refuse inputs that are tokenized otherwise than run.init_from, or would be.

    Nothing has been opened or prepared yet, so nothing wrong is left behind. One process calls it.
    """
    model = find_model(config.run.init_from or "")
    _refuse_unequal_sizes(model)
    data = config.data
    has_raw = False
    for name, source in (data.named_sources() | data.validation).items():
        folders = prepared_folders(source, data.field_of(name))
        has_raw |= not folders
        for folder in folders:
            refuse_tokenizer(model, tokenizer_of(folder), f"{data.field_of(name)}={folder}")
    if not has_raw:
        return
    if is_trained_spec(data.tokenizer) and data.tokenizer != "byte":
        raise UserError(
            f"data.tokenizer={data.tokenizer} would be made from the new text, but"
            f" run.init_from={model.name} has its own; rule: the same one; nearest:"
            f" data.tokenizer={model.name}"
        )
    if data.tokenizer == "byte":
        tokenizer = train_tokenizer("byte", [])
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    refuse_tokenizer(model, tokenizer, f"data.tokenizer={data.tokenizer}")


def refuse_tokenizer(model: Pretrained, tokenizer: Tokenizer, where: str) -> None:
    """Refuse a tokenizer that is not the model's."""
    is_same = tokenizer.vocab_size == model.spec.vocab_size
    if model.has_tokenizer:
        is_same &= tokenizer.sha256 == Tokenizer.load(model.folder).sha256
    if is_same:
        return
    raise UserError(
        f"run.init_from={model.name} was trained with another tokenizer"
        f" ({model.spec.vocab_size} tokens) than {where} has ({tokenizer.vocab_size}); nearest:"
        f" text that is prepared with --tokenizer {model.name}"
    )


def _refuse_unequal_sizes(model: Pretrained) -> None:
    """Refuse a model whose network has more or fewer tokens than its tokenizer."""
    if not model.has_tokenizer:
        return
    tokens = Tokenizer.load(model.folder).vocab_size
    if tokens != model.spec.vocab_size:
        raise UserError(
            f"run.init_from={model.name} has {model.spec.vocab_size} tokens in its config.json and"
            f" {tokens} in its tokenizer.json; rule: as many"
        )
