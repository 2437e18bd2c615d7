#!/usr/bin/env bash
# Makes everything in this folder but README.md and itself, with the code in the folder $1.
# It was run once, on a clean checkout of 907367e: later versions must read what that one wrote.
set -euo pipefail
code=$(realpath "$1")
cd "$(dirname "$0")"
rm -rf text shards on_shards on_stream expected
export PYTHONPATH=$code

# The text: sentences of a few words in two files, the same on every machine.
mkdir text
python - <<'EOF'
import json
import random

rng = random.Random(907367)
words = "the a cat dog bird tree house runs sleeps eats and or not under over big red".split()
for name in ("one", "two"):
    with open(f"text/{name}.jsonl", "w") as file:
        for number in range(30):
            text = f"{name} {number} " + " ".join(rng.choices(words, k=rng.randint(8, 20))) + "."
            file.write(json.dumps({"text": text}) + "\n")
EOF
touch -d @1700000000 text/* # a stream records when its files were changed

python -m dist_lm.prepare --input text --output shards --tokenizer byte --processes 1

# Two runs of 12 steps, kept as they stand after 6: one on the prepared folder, one on a stream.
both=(--model.layers 1 --model.heads 2 --model.width 8 --model.ffn_width 16 --model.init xavier
    --data.seq_len 16 --data.global_batch 4 --optim.lr 0.01 --optim.warmup_steps 3 --run.steps 12
    --run.eval_every 0 --run.log_batch_hash true --run.trackers)
on_shards=(--data.input shards --run.ema 0.9)
on_stream=(--data.input text --data.stream true --data.lanes 2 --data.tokenizer char
    --optim.name muon --model.dropout 0.1)
train() { python "$code/dist_lm/train.py" "${both[@]}" "$@"; }
train "${on_shards[@]}" --run.dir on_shards --run.stop_after 6
train "${on_stream[@]}" --run.dir on_stream --run.stop_after 6
rm on_*/loss.png

# What the same code makes of them: the texts of step 5, greedy text, and the rest of each run.
mkdir expected
continue_run() { # its name, its settings
    python -m dist_lm.show "$1" --step 5 | grep '^    | ' >"expected/$1.shown.txt"
    python -m dist_lm.generate --ckpt "$1" --prompt "the cat" --temperature 0 --max_new_tokens 24 \
        --json --logprobs --seed 1 >"expected/$1.generated.json"
    cp -r "$1" continued
    train "${@:2}" --run.dir continued
    mv continued/metrics.jsonl "expected/$1.metrics.jsonl"
    mkdir "expected/$1"
    mv continued/step-00000012/*.safetensors "expected/$1"
    rm -r continued
}
continue_run on_shards "${on_shards[@]}"
continue_run on_stream "${on_stream[@]}"
