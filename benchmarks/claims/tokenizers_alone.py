"""Training a BPE and encoding with one, against the `tokenizers` library alone."""

import os

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from benchmarks import corpus
from benchmarks.claim import COST, FASTER, Claim, Context, Measured, Target, must_equal, take_turns
from dist_lm.data.tokenizer import BYTE_OF, EOT, Tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer


def train(ctx: Context) -> Measured:
    """Our side also takes a sample by the hash of each text, and bounds the trainer's memory."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    size = ctx.pick(32_768, 400)
    documents = list(corpus.documents(ctx.pick(48, 0.1)))
    made: dict[str, object] = {}

    def ours() -> None:
        made["ours"] = train_tokenizer(f"bpe:{size}", documents).vocabulary

    def theirs() -> None:
        alone = tokenizers.Tokenizer(models.BPE())
        alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[EOT],
            initial_alphabet=list(BYTE_OF),
            show_progress=False,
        )
        alone.train_from_iterator(documents, trainer)
        made["theirs"] = alone.get_vocab()

    ours()
    theirs()
    equal = must_equal(made["ours"], made["theirs"], "vocabularies")
    return take_turns(ctx, ours, theirs, equal)


def encode(ctx: Context) -> Measured:
    folder = ctx.scratch / "tokenizer"
    file = corpus.make_tokenizer(folder, ctx.pick(8192, 300), ctx.pick(8, 0.1))
    documents = list(corpus.documents(ctx.pick(6, 0.1)))
    tokenizer = Tokenizer.load(file)
    assert not tokenizer.why_slow(), tokenizer.why_slow()
    alone = tokenizers.Tokenizer.from_file(str(file))
    found: dict[str, list[list[int]]] = {}

    def ours() -> None:
        arrays = tokenizer.encode_arrays(documents)
        found["ours"] = [array.tolist() for array in arrays]

    def theirs() -> None:
        encodings = alone.encode_batch_fast(documents, add_special_tokens=False)
        found["theirs"] = [encoding.ids for encoding in encodings]

    ours()
    theirs()
    equal = must_equal(found["ours"], found["theirs"], "tokens")
    return take_turns(ctx, ours, theirs, equal, clock="cpu")


CLAIMS = (
    Claim(
        name="bpe-training",
        sentence="training a BPE of 32,768 tokens on 48 MB, against tokenizers alone",
        figure=COST,
        target=Target(most=1.0),
        measure=train,
        threads=2,
        rounds=1,
    ),
    Claim(
        name="bpe-encoding",
        sentence="encoding text with a BPE of 8,192 tokens, against tokenizers (CPU time)",
        figure=FASTER,
        target=Target(least=3.0),
        measure=encode,
    ),
)
