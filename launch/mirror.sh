#!/bin/bash
# Runs a command that trains in a local folder, and keeps its checkpoints in another place, which may be a bucket that is
# mounted as a folder: files are only written there, one after another, and never renamed or appended to.
#   launch/mirror.sh RUN /bucket/run launch/torchrun.sh --config configs/gpt2-124m.yaml --run.dir RUN
# RUN is first filled from the other place. So the same line goes on where a machine was lost that does not come back.
# New checkpoints are copied every MIRROR_SECONDS (30), and once more at the end. RUN/data is not copied: train on shards
# that are prepared already. Ends with the command's exit code.
set -uo pipefail
[[ $# -ge 3 ]] || { echo "mirror.sh: error: launch/mirror.sh RUN PLACE COMMAND ..." >&2; exit 2; }
run=$1 place=$2 && shift 2
seconds=${MIRROR_SECONDS:-30}
mkdir -p "$run" "$place" || exit 2

copy_step() { # FROM TO: the manifest comes last, so that half a copy is not taken for a checkpoint
    local file
    mkdir -p "$2" || return
    for file in "$1"/*; do
        [[ ${file##*/} == manifest.json ]] || cp "$file" "$2/" || return
    done
    cp "$1/manifest.json" "$2/"
}

copy_new() { # FROM TO: the steps that TO lacks, then the small files beside them
    local step file name
    for step in "$1"/step-*/; do
        name=$(basename "$step")
        [[ ! -f $step/manifest.json || -f $2/$name/manifest.json ]] || copy_step "${step%/}" "$2/$name" || return
    done
    for file in "$1"/*; do
        # The lock is that of the machine that has the folder.
        [[ ! -f $file || ${file##*/} == run.lock ]] || cp "$file" "$2/" || return
    done
}

drop_old() { # deletes at the other place what is no longer here
    local step
    for step in "$place"/step-*/; do
        [[ ! -d $step || -d $run/$(basename "$step") ]] || rm -r "$step"
    done
}

mirror() {
    if copy_new "$run" "$place"; then
        drop_old
    else
        echo "mirror.sh: warning: not all was copied to $place; it is tried again" >&2
    fi
}

copy_new "$place" "$run" || exit 74
"$@" &
command=$!
trap 'kill -s TERM "$command" 2>/dev/null' TERM INT # a background command ignores Ctrl-C itself
trap 'kill -s USR1 "$command" 2>/dev/null' USR1
while kill -0 "$command" 2>/dev/null; do
    for ((waited = 0; waited < seconds; waited++)); do
        kill -0 "$command" 2>/dev/null || break
        sleep 1
    done
    mirror
done
wait "$command"
code=$?
mirror
exit "$code"
