#!/bin/bash
# Starts one rank of a job step. It tells the rank who it is, in the variables that torch reads, and chooses the network
# interface that leads to the other nodes.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
# shellcheck source=launch/net.sh
source "$(dirname "$0")/../launch/net.sh"
for host in $DIST_LM_HOSTS; do
    [[ $host == "$SLURMD_NODENAME" ]] || { use_interface_to "$host" && break; }
done
exec "$@"
