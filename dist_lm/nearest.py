"""The good value that a user means: by its spelling, or by what other trainers call it."""

import difflib
from collections.abc import Iterable

_LONGEST_WORD = 100  # characters of a name that are compared with the good ones

# What other trainers call the settings of a run.
OTHER_NAMES = {
    "accum_iter": "data.global_batch",
    "adam_epsilon": "optim.eps",
    "batch_size": "data.global_batch",
    "block_size": "data.seq_len",
    "context_length": "data.seq_len",
    "ctx_len": "data.seq_len",
    "d_model": "model.width",
    "data_dir": "data.input",
    "dataset": "data.input",
    "dataset_name": "data.input",
    "decay_lr": "optim.schedule",
    "emb_dim": "model.width",
    "embed_dim": "model.width",
    "eval_interval": "run.eval_every",
    "eval_iters": "run.eval_batches",
    "eval_steps": "run.eval_every",
    "global_batch_size": "data.global_batch",
    "grad_accum": "data.global_batch",
    "grad_clip": "optim.clip",
    "gradient_accumulation_steps": "data.global_batch",
    "gradient_checkpointing": "run.activation_checkpointing",
    "hidden_size": "model.width",
    "intermediate_size": "model.ffn_width",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "max_grad_norm": "optim.clip",
    "max_iters": "run.steps",
    "max_length": "data.seq_len",
    "max_lr": "optim.lr",
    "max_position_embeddings": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "max_steps": "run.steps",
    "micro_batch_size": "data.micro_batch",
    "model_name_or_path": "run.init_from",
    "n_ctx": "data.seq_len",
    "n_embd": "model.width",
    "n_head": "model.heads",
    "n_kv_head": "model.kv_heads",
    "n_layer": "model.layers",
    "n_layers": "model.layers",
    "n_positions": "data.seq_len",
    "num_attention_heads": "model.heads",
    "num_epochs": "run.epochs",
    "num_heads": "model.heads",
    "num_hidden_layers": "model.layers",
    "num_key_value_heads": "model.kv_heads",
    "num_layers": "model.layers",
    "num_train_epochs": "run.epochs",
    "num_workers": "data.workers",
    "optimizer": "optim.name",
    "out_dir": "run.dir",
    "output_dir": "run.dir",
    "per_device_train_batch_size": "data.micro_batch",
    "report_to": "run.trackers",
    "resume_from_checkpoint": "run.resume",
    "save_steps": "run.save_every",
    "save_total_limit": "run.keep_last",
    "sequence_length": "data.seq_len",
    "tokenizer_name": "data.tokenizer",
    "train_batch_size": "data.global_batch",
    "train_file": "data.input",
    "warmup": "optim.warmup_steps",
    "warmup_iters": "optim.warmup_steps",
    "warmup_ratio": "optim.warmup_steps",
    # These have their value in the name.
    "amp": "run.precision bf16",
    "bf16": "run.precision bf16",
    "fp16": "run.precision fp16",
}
# What others call a value of one of our settings.
OTHER_VALUES = {
    "absolute": "learned",
    "adam": "adamw",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "gelu_new": "gelu_tanh",
    "half": "fp16",
    "layer_norm": "layernorm",
    "mixed": "bf16",
    "rms": "rmsnorm",
    "rotary": "rope",
    "swish": "silu",
}


def did_you_mean(value: str, options: Iterable[object], prefix: str = "") -> str:
    """Text that names the nearest option, or nothing."""
    guess = closest(value, options)
    return f"; did you mean {prefix}{guess}?" if guess else ""


def closest(value: str, options: Iterable[object]) -> str:
    """The option that is meant, or an empty string.

    It is what another trainer calls so, or the field of that name in another section, or the name
    that is most like it.
    """
    names = [str(option) for option in options]
    field = value.rpartition(".")[2].lower().replace("-", "_")
    known = OTHER_NAMES.get(field, OTHER_VALUES.get(field, ""))
    if known.partition(" ")[0] in names:
        return known
    same_field = [name for name in names if name.rpartition(".")[2] == field]
    return same_field[0] if same_field else nearest(value, names)


def nearest(value: str, options: Iterable[object]) -> str:
    """The option most like `value`, or an empty string."""
    names = [str(option) for option in options]
    matches = difflib.get_close_matches(value[:_LONGEST_WORD], names, n=1, cutoff=0.5)
    return matches[0] if matches else ""
