#!/bin/bash
# Starts train.py by torchrun, and starts it again after a failure:
#   launch/torchrun.sh --nproc 2 --config configs/char.yaml --data.input my.txt
#   launch/torchrun.sh --nnodes 2 --host node0 --node-rank 0 --config configs/gpt2-124m.yaml     (--node-rank 1 on the other)
#   launch/torchrun.sh --nnodes 1:2 --host node0 ...     elastic: goes on with the nodes that are left
# Flags: launch/torchrun.sh --help
# shellcheck disable=SC2154
make_command() {
    command=("$PYTHON" -m torch.distributed.run --nnodes "$nnodes" --nproc-per-node "$nproc_per_node")
    if [[ $nnodes == *:* ]]; then
        command+=(--rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id dist_lm --max-restarts "$restarts")
    else # a static rendezvous: torchrun's elastic agents were seen to hang after a cut link
        command+=(--node-rank "$node_rank" --master-addr "$host" --master-port "$master_port")
    fi
    command+=("${train_py[@]}" --launch "$launch" "${train[@]}")
}
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
