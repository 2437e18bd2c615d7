#!/bin/bash
#SBATCH --job-name=dist_lm-prepare
#SBATCH --requeue
#SBATCH --open-mode=append
# Tokenizes as a job array. Task I of N prepares every N-th file into OUTPUT/part-I, which is a prepared folder:
#   sbatch --array 0-15 --cpus-per-task 8 slurm/prepare.sh --input 'corpus/*.jsonl' --output shards --tokenizer tok.json
# The tokenizer must exist already. With bpe:N each part would learn its own. A task that is started again goes on where
# it stood.
# DIST_LM_HOME, PYTHON, SETUP and CONTAINER mean what they mean in slurm/train.sh.
set -uo pipefail
if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    echo "slurm/prepare.sh: error: this is no job; submit it with sbatch: sbatch --array 0-15 slurm/prepare.sh ..." >&2
    exit 2
fi
cd "${DIST_LM_HOME:-$SLURM_SUBMIT_DIR}" || exit 2
# shellcheck source=slurm/setup.sh
source slurm/setup.sh
refuse() { echo "slurm/prepare.sh: error: $*" >&2; exit 2; }

input='' output='' tokenizer='' rest=()
while [[ $# -gt 0 ]]; do
    [[ $1 == --?* && $# -gt 1 ]] || refuse "$1 must be a flag with a value, as in --input FILES"
    case $1 in
        --input) input=$2 ;;
        --output) output=$2 ;;
        --tokenizer) tokenizer=$2 ;;
        *) rest+=("$1" "$2") ;;
    esac
    shift 2
done
[[ -n $input && -n $output && -n $tokenizer ]] || refuse "--input, --output and --tokenizer are needed"
[[ $tokenizer != bpe:* && $tokenizer != char ]] || refuse "--tokenizer $tokenizer would be another one in each part; nearest: a tokenizer.json, e.g. of python -m dist_lm.prepare on one file"
if [[ -d $input ]]; then input="$input/*"; fi
mapfile -t files < <(compgen -G "$input" | LC_ALL=C sort)
[[ ${#files[@]} -gt 0 ]] || refuse "--input $input: no file matches"

number=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0})) count=${SLURM_ARRAY_TASK_COUNT:-1}
[[ ${#files[@]} -ge $count ]] || refuse "--array has $count tasks for ${#files[@]} files; nearest: --array 0-$((${#files[@]} - 1))"
part=$output/part-$(printf %05d "$number")
share=$part.files # links to its files, under names that keep their order
mkdir -p "$share" || exit 2
for ((n = number; n < ${#files[@]}; n += count)); do
    ln -sfn "$(realpath "${files[n]}")" "$share/$(printf %08d "$n")-$(basename "${files[n]}")"
done
exec srun --ntasks=1 --nodes=1 --cpu-bind=none "${container[@]}" "$PYTHON" -m dist_lm.prepare \
    --input "$share" --output "$part" --tokenizer "$tokenizer" "${rest[@]}"
