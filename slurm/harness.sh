#!/bin/bash
#SBATCH --job-name=dist_lm-harness
#SBATCH --ntasks=1
# Measures checkpoints with lm-eval in one process. All arguments are those of dist_lm.harness:
#   sbatch --gpus 1 --time 12:00:00 slurm/harness.sh --ckpt runs/mine --tasks arc_easy,hellaswag --follow
# The same line again goes on: what was measured is not measured again.
# DIST_LM_HOME, PYTHON, SETUP and CONTAINER mean what they mean in slurm/train.sh.
set -uo pipefail
if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    echo "slurm/harness.sh: error: this is no job; submit it with sbatch: sbatch --gpus 1 --time 60 slurm/harness.sh ..." >&2
    exit 2
fi
cd "${DIST_LM_HOME:-$SLURM_SUBMIT_DIR}" || exit 2
# shellcheck source=slurm/setup.sh
source slurm/setup.sh
exec srun --ntasks=1 --nodes=1 "${container[@]}" "$PYTHON" -m dist_lm.harness "$@"
