#!/bin/bash
#SBATCH --job-name=dist_lm
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
# Trains on what the sbatch line asks for. Nodes, GPUs, head node and port come from the allocation:
#   sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 slurm/train.sh --config configs/gpt2-124m.yaml --optim.lr 3e-4
#
# What may have to be exported first (slurm/README.md says when):
#   LAUNCH          how the processes share the work, a file of launch/: ddp, zero1, zero2, zero3 ...       (ddp)
#   DIST_LM_HOME    the checkout                                                 (the folder sbatch was called in)
#   PYTHON          the interpreter                                               (the checkout's .venv, or python3)
#   SETUP           a file to source on the first node: modules, conda, variables; srun hands them on           (none)
#   CONTAINER       words for srun where pyxis is there: "--container-image=... --container-mounts=..."         (none)
#   PROCS_PER_NODE  processes on a node                          (its GPUs; without any --ntasks-per-node, or 1)
#   STOP_BEFORE     seconds before the job's end to save and stop       (120, at most a quarter of the job's time)
#   DOCTOR          1: check the machines first, and stop if they are not fit                                   (0)
#
# `bash slurm/train.sh --dry-run ...` prints the srun line and stops. Outside of a job it pretends to have 2 nodes of 8 GPUs;
# SLURM_JOB_NUM_NODES and SLURM_GPUS_ON_NODE, if they are set, say otherwise.
set -uo pipefail
say() { echo "slurm/train.sh: $*" >&2; }
dry_run='' words=()
for word in "$@"; do
    if [[ $word == --dry-run ]]; then dry_run=1; else words+=("$word"); fi
done
set -- "${words[@]}"
if [[ -n $dry_run && -z "${SLURM_JOB_ID:-}" ]]; then
    SLURM_JOB_ID=1 SLURM_JOB_NUM_NODES=${SLURM_JOB_NUM_NODES:-2} SLURM_GPUS_ON_NODE=${SLURM_GPUS_ON_NODE:-8}
    SLURM_JOB_NODELIST=pretended SLURM_JOB_END_TIME=0 SLURM_SUBMIT_DIR=$(cd "$(dirname "$0")/.." && pwd)
    scontrol() { seq -f 'node%g' 0 $((SLURM_JOB_NUM_NODES - 1)); }
elif [[ -z "${SLURM_JOB_ID:-}" ]]; then
    say "error: this is no job; submit it with sbatch: sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 slurm/train.sh ..."
    exit 2
fi
cd "${DIST_LM_HOME:-$SLURM_SUBMIT_DIR}" || exit 2
# shellcheck source=slurm/setup.sh
source slurm/setup.sh
LAUNCH=${LAUNCH:-ddp}
# shellcheck source=launch/net.sh
source launch/net.sh

outcome() { # runs dist_lm.outcome in the environment that trains
    if [[ ${#container[@]} -gt 0 ]]; then
        srun --nodes=1 --ntasks=1 --overlap "${container[@]}" "$PYTHON" -m dist_lm.outcome "$@"
    else
        "$PYTHON" -m dist_lm.outcome "$@"
    fi
}

train_py=(dist_lm/train.py)
[[ -f ${train_py[0]} ]] || train_py=(-m dist_lm.train) # outside of a checkout the installed package is started
train=("$@" --launch "$LAUNCH")
numbers=$(outcome before "${train[@]}") || exit
read -r DIST_LM_ATTEMPT run_dir <<<"$numbers"
[[ -n $dry_run ]] || mkdir -p "$run_dir/logs" || exit 2

gpus=${SLURM_GPUS_ON_NODE:-$(tr -cd , <<<"${SLURM_JOB_GPUS:+$SLURM_JOB_GPUS,}" | wc -c)}
[[ $gpus -gt 0 ]] || gpus=${SLURM_NTASKS_PER_NODE:-1}
LOCAL_WORLD_SIZE=${PROCS_PER_NODE:-$gpus}
WORLD_SIZE=$((SLURM_JOB_NUM_NODES * LOCAL_WORLD_SIZE))
DIST_LM_HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd ' ')
MASTER_ADDR=${DIST_LM_HOSTS%% *} MASTER_PORT=$(free_port "$SLURM_JOB_ID")

# When the job ends, so that the run can stop before it: a signal can be lost, a clock cannot.
ends=${SLURM_JOB_END_TIME:-$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*EndTime=\([0-9T:-]*\).*/\1/p')}
if [[ $ends == *T* ]]; then ends=$(date -d "$ends" +%s); fi
DIST_LM_STOP_AT=
[[ $ends =~ ^[0-9]+$ ]] || ends=0
left=$((ends - $(date +%s))) before=${STOP_BEFORE:-120}
if [[ $left -gt 0 && $left -lt 31000000 ]]; then # Slurm says a year for no limit
    DIST_LM_STOP_AT=$((ends - (before * 4 > left ? left / 4 : before)))
fi
DIST_LM_START_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0} # this start uses it to say that another run has the folder
export DIST_LM_ATTEMPT DIST_LM_START_ID DIST_LM_HOSTS DIST_LM_STOP_AT LOCAL_WORLD_SIZE WORLD_SIZE MASTER_ADDR MASTER_PORT

# Each rank is a task, so a signal reaches each rank once, and no launcher stands between the ranks and Slurm. Every rank
# sees all CPUs and GPUs of its node and takes its own.
unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_NTASKS_PER_NODE SLURM_NTASKS
run=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$WORLD_SIZE" --ntasks-per-node="$LOCAL_WORLD_SIZE" --overcommit
    --cpu-bind=none --kill-on-bad-exit=1 --unbuffered "${container[@]}")
trap ':' TERM USR1 # the ranks get these signals too, and this script still has work to do after they end
if [[ "${DOCTOR:-0}" == 1 && -z $dry_run ]]; then
    "${run[@]}" slurm/rank.sh "$PYTHON" -m dist_lm.doctor "${train[@]}" || exit
fi
run+=(--output="$run_dir/logs/%N-rank%t.log" --open-mode=append slurm/rank.sh "$PYTHON" "${train_py[@]}" "${train[@]}")
if [[ -n $dry_run ]]; then
    echo "${run[*]}"
    exit 0
fi
say "attempt $DIST_LM_ATTEMPT, $WORLD_SIZE processes on $DIST_LM_HOSTS, port $MASTER_PORT, logs in $run_dir/logs"
say "${run[*]}"
"${run[@]}"
code=$?

outcome after "$DIST_LM_ATTEMPT" "$code" "${train[@]}"
code=$?
if [[ $code == 70 || $code == 75 ]]; then
    # Slurm has already put a preempted job back into the queue, and a cancelled one must not return.
    state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
    say "job $SLURM_JOB_ID is $state"
    if [[ $state == RUNNING || $state == TIMEOUT ]]; then scontrol requeue "$SLURM_JOB_ID" && code=0; fi
fi
exit "$code"
