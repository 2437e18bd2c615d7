# shellcheck shell=bash
# torchrun.sh and accelerate.sh share this file. Each of them defines make_command, which fills `command`.
#
#   --nproc N          processes on this node                               (its GPUs; without any, 1)
#   --nnodes N         nodes; the same command runs on each of them         (1)
#   --host HOST        the first node's name or address                     (needed with --nnodes)
#   --node-rank R      which node this is, from 0                           (needed with --nnodes)
#   --port P           a port of the first node; attempt A uses P+A-1        (one node: a free one; several: 29400)
#   --interface NAME   the network interface                                (the one that leads to HOST)
#   --launch NAME      how the processes share the work: a file of launch/  (ddp)
#   --restarts N       starts after failures, from the newest checkpoint    (3)
#   --dry-run          print the command and stop
# Everything else goes to train.py. SIGTERM, SIGUSR1 and Ctrl-C reach every rank, which saves and stops with exit code 75.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/net.sh
source "$root/launch/net.sh"

script=$(basename "$0")
# In a process of its own, which ends if nobody reads the stream any more.
say() { (echo "$script: $*" >&2); }
refuse() { say "error: $*"; exit 2; }

gpus() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[0-9A-Za-z]'
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU'
    else
        echo 0
    fi
}

nproc_per_node='' nnodes=1 host='' node_rank='' port='' interface='' launch=ddp restarts=3 dry_run='' train=()
while [[ $# -gt 0 ]]; do
    word=$1 && shift
    case $word in
        --dry-run) dry_run=1 && continue ;;
        --help | -h) sed -n '/^#   --/p' "$root/launch/common.sh" | cut -c3- && exit 0 ;;
        --nproc | --nnodes | --host | --node-rank | --port | --interface | --launch | --restarts)
            [[ $# -gt 0 ]] || refuse "$word needs a value"
            value=$1 && shift ;;
        --nproc=* | --nnodes=* | --host=* | --node-rank=* | --port=* | --interface=* | --launch=* | --restarts=*)
            value=${word#*=} word=${word%%=*} ;;
        *) train+=("$word") && continue ;;
    esac
    case $word in
        --nproc) nproc_per_node=$value ;;
        --nnodes) nnodes=$value ;;
        --host) host=$value ;;
        --node-rank) node_rank=$value ;;
        --port) port=$value ;;
        --interface) interface=$value ;;
        --launch) launch=$value ;;
        --restarts) restarts=$value ;;
    esac
    if [[ $word =~ ^--(nproc|node-rank|port|restarts)$ && ! $value =~ ^[0-9]+$ ]]; then
        refuse "$word $value must be a whole number"
    fi
done
[[ -n $nproc_per_node ]] || nproc_per_node=$(gpus)
[[ $nproc_per_node -gt 0 ]] || nproc_per_node=1
[[ $nnodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || refuse "--nnodes $nnodes must be a number, or MIN:MAX"
[[ -f $root/launch/$launch.yaml ]] ||
    refuse "--launch $launch must be one of: $(cd "$root/launch" && echo ./*.yaml | sed 's/\.yaml//g; s/\.\///g')"
if [[ $nnodes != 1 ]]; then
    [[ -n $host ]] || refuse "--nnodes $nnodes needs --host, the first node's name or address"
    [[ -n $node_rank || $nnodes == *:* ]] || refuse "--nnodes $nnodes needs --node-rank, from 0 on the first node"
    getent ahosts "$host" >/dev/null || refuse "--host $host is not a name that leads to an address"
    port=${port:-29400}
    use_interface_to "$host" || say "warning: no network interface found that leads to $host; choose one by --interface"
fi
if [[ -n $interface ]]; then
    [[ -e /sys/class/net/$interface ]] ||
        refuse "--interface $interface is not there; nearest: $(cd /sys/class/net && echo *)"
    export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface
fi
host=${host:-127.0.0.1} node_rank=${node_rank:-0}
[[ -n "${PYTHON:-}" || ! -x $root/.venv/bin/python ]] || PYTHON=$root/.venv/bin/python
PYTHON=${PYTHON:-python3}
# Outside of a checkout (a wheel, or a folder that `dist-lm init` made) the installed package is started.
train_py=("$root/dist_lm/train.py")
[[ -f ${train_py[0]} ]] || train_py=(-m dist_lm.train)
threads=$(($(nproc) / nproc_per_node))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# torchrun passes these signals on to the ranks. Any other signal ends torchrun alone and leaves the ranks running.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1,SIGUSR2
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120} # seconds that the last checkpoint may take

ranks_of() { # PID: prints its children that still run. A launcher may leave zombies, which do not count
    local child state
    cat "/proc/$1/task/"*/children 2>/dev/null | tr ' ' '\n' | while read -r child; do
        state=$(sed 's/.*) //; s/ .*//' "/proc/${child:-none}/stat" 2>/dev/null)
        [[ -z $state || $state == Z ]] || echo "$child"
    done
}

# SIGNAL: sends the first one to the launcher, which passes it on to the ranks. Later ones go to the ranks themselves,
# because by then the launcher only waits for them.
forward() {
    local to=("$launcher")
    [[ -z $forwarded ]] || mapfile -t to < <(ranks_of "$launcher")
    kill -s "$1" "${to[@]}" 2>/dev/null
    forwarded=1
}

# FILE: passes standard input on to standard error, but puts into FILE what the launcher says about the end of its ranks:
# its log lines, and its traceback with all that follows. torchrun and accelerate print these after any exit code but 0,
# also after a run that was told to stop and has saved.
hold_launcher() {
    trap '' TERM USR1 INT PIPE # ends with its input, so that nothing gets lost
    local line block='' rest=''
    while IFS= read -r line || [[ -n $line ]]; do
        if [[ -n $rest ]]; then
            printf '%s\n' "$line" >>"$1"
        elif [[ $line == 'Traceback (most recent call last):' ]]; then
            [[ -z $block ]] || printf '%s\n' "$block" >&2
            block=$line
        elif [[ -n $block ]]; then # whose traceback is it?
            block+=$'\n'$line
            case $line in
                *torch/distributed/run.py* | *accelerate/commands/*) printf '%s\n' "$block" >>"$1" && block='' rest=1 ;;
                '  File "<frozen runpy>"'* | '    '*) ;;
                *) printf '%s\n' "$block" >&2 && block='' ;;
            esac
        elif [[ $line =~ ^[IWE][0-9]{4}\ .*torch/distributed/ && $nnodes != *:* ]]; then
            printf '%s\n' "$line" >>"$1"
        else
            printf '%s\n' "$line" >&2
        fi
    done
    [[ -z $block ]] || printf '%s\n' "$block" >&2
}

run_command() { # FILE: runs the command to its end, with hold_launcher FILE, and returns its exit code
    local had_ranks='' alone=0 code errors holder
    exec {errors}> >(hold_launcher "$1")
    holder=$!
    set -m # gives the command its own process group, so that a terminal's Ctrl-C reaches it once, through us
    # shellcheck disable=SC2154
    "${command[@]}" </dev/null 2>&"$errors" {errors}>&- &
    launcher=$! forwarded=''
    set +m
    exec {errors}>&-
    for name in TERM USR1 INT; do
        # shellcheck disable=SC2064
        trap "forward $name" "$name"
    done
    while kill -0 "$launcher" 2>/dev/null; do
        sleep 0.5
        if [[ -n $(ranks_of "$launcher") ]]; then
            had_ranks=1 alone=0
        elif [[ -n $had_ranks ]] && ((++alone > ${LAUNCHER_SECONDS:-120} * 2)); then
            say "the ranks ended, the launcher did not: killed"
            kill -KILL "$launcher"
            had_ranks=''
        fi
    done
    trap - TERM USR1 INT
    wait "$launcher"
    code=$?
    for ((tenths = 0; tenths < 20; tenths++)); do # a rank that is left behind may keep it
        kill -0 "$holder" 2>/dev/null || break
        sleep 0.1
    done
    return "$code"
}

for ((start = 0; ; start++)); do
    numbers=$("$PYTHON" -m dist_lm.outcome before "${train[@]}") || exit
    read -r DIST_LM_ATTEMPT _ <<<"$numbers"
    DIST_LM_START_ID=$(uname -n)-$$-$start # this start uses it to say that another run has the folder
    export DIST_LM_ATTEMPT DIST_LM_START_ID
    if [[ -n $port ]]; then master_port=$((port + DIST_LM_ATTEMPT - 1)); else master_port=$(free_port $$); fi
    if [[ $node_rank == 0 ]] && port_in_use "$master_port"; then
        refuse "--port $port: port $master_port is in use on this host; choose another"
    fi
    make_command
    if [[ -n $dry_run ]]; then
        (echo "+ ${command[*]}")
        exit 0
    fi
    (echo "+ ${command[*]}" >&2)
    held=$(mktemp) || exit
    run_command "$held"
    code=$?
    ending=$("$PYTHON" -m dist_lm.outcome after "$DIST_LM_ATTEMPT" "$code" "${train[@]}" 2>&1)
    code=$?
    # Where our own line says why the run ended (done, preempted, or refused), the launcher's words add nothing.
    case $code in
        0 | 2 | 65 | 66 | 75 | 76 | 77) ;;
        *) (cat "$held" >&2) ;;
    esac
    rm -f "$held"
    (echo "$ending" >&2)
    [[ $code == 70 && $start -lt $restarts ]] || exit "$code"
    say "restart $((start + 1)) of at most $restarts"
done
