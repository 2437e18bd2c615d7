#!/bin/bash
# Starts train.py by `accelerate launch`, and starts it again after a failure. The flags are those of torchrun.sh; only
# MIN:MAX nodes are refused:
#   launch/accelerate.sh --nproc 2 --launch zero2 --config configs/char.yaml --data.input my.txt
# shellcheck disable=SC2154
make_command() {
    [[ $nnodes != *:* ]] || refuse "--nnodes $nnodes: elastic only by launch/torchrun.sh"
    local all=$((nnodes * nproc_per_node)) file=$launch
    [[ $all -gt 1 || $file != ddp ]] || file=single
    command=("$PYTHON" -m accelerate.commands.launch --config_file "$root/launch/$file.yaml" --num_processes "$all")
    command+=(--num_machines "$nnodes" --machine_rank "$node_rank" --main_process_ip "$host")
    command+=(--main_process_port "$master_port" "${train_py[@]}" "${train[@]}")
}
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
