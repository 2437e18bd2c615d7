"""Training a BPE and encoding with one, against the `tokenizers` library alone."""

import os

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from benchmarks import corpus
from benchmarks.claim import COST, FASTER, Claim, Context, Measured, Target, must_equal, take_turns
from dist_lm.data.tokenizer import BYTE_OF, EOT, Tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer

_SAME_TOKENS = 0.95  # of both vocabularies, at least


def train(ctx: Context) -> Measured:
    """Our side also takes a sample by the hash of each text, and bounds the trainer's memory.

    It cuts very long texts into stretches. So a few words are counted in two parts, and some of the
    rarest tokens, which are equally frequent, may be others.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    size = ctx.pick(32_768, 400)
    documents = list(corpus.documents(ctx.pick(48, 0.1)))
    made: dict[str, dict[str, int]] = {}

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
    must_equal(len(made["ours"]), len(made["theirs"]), "sizes of vocabularies")
    share = len(made["ours"].keys() & made["theirs"].keys()) / len(made["theirs"])
    assert share > _SAME_TOKENS, f"only {share:.1%} of the tokens are the same"
    equal = f"equal sizes of vocabularies, {share:.1%} of the tokens the same"
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
        tried="long words are searched only where there are any: 0.7 to 0.8 of the sample's CPU"
        " time; what is left matches the distinct words that bound the trainer's memory",
    ),
    Claim(
        name="bpe-encoding",
        sentence="encoding text with a BPE of 8,192 tokens, against tokenizers (CPU time)",
        figure=FASTER,
        target=Target(least=3.0),
        measure=encode,
    ),
)
