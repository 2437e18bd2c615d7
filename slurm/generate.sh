#!/bin/bash
#SBATCH --job-name=dist_lm-generate
#SBATCH --ntasks=1
# Generates text from a checkpoint in one process. All arguments are those of dist_lm.generate:
#   sbatch --gpus 1 --time 10 slurm/generate.sh --ckpt runs/mine --prompt "Once" --num_samples 8
# DIST_LM_HOME, PYTHON, SETUP and CONTAINER mean what they mean in slurm/train.sh.
set -uo pipefail
if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    echo "slurm/generate.sh: error: this is no job; submit it with sbatch: sbatch --gpus 1 --time 10 slurm/generate.sh ..." >&2
    exit 2
fi
cd "${DIST_LM_HOME:-$SLURM_SUBMIT_DIR}" || exit 2
# shellcheck source=slurm/setup.sh
source slurm/setup.sh
exec srun --ntasks=1 --nodes=1 "${container[@]}" "$PYTHON" -m dist_lm.generate "$@"
