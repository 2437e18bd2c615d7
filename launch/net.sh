# shellcheck shell=bash
# Finds ports and network interfaces. Other scripts source this file.

port_in_use() { # PORT: whether somebody listens on it, on any address
    grep -qi "^ *[0-9]*: [0-9a-f]*:$(printf %04X "$1") [0-9a-f:]* 0A" /proc/net/tcp /proc/net/tcp6 2>/dev/null
}

free_port() { # SEED: prints a free port, below those that the system gives out by itself
    local port=$((15000 + $1 % 10000))
    while port_in_use "$port"; do port=$((port + 1)); done
    echo "$port"
}

# gloo uses the address that this host's own name leads to. That is often 127.0.1.1, or belongs to another network.
# HOST: makes gloo use the interface on the way to HOST, or the one that has HOST's address, unless the user chose one.
use_interface_to() {
    local address found
    [[ -z "${GLOO_SOCKET_IFNAME:-}" ]] && command -v ip >/dev/null || return 0
    address=$(getent ahosts "$1" | head -n1 | cut -d' ' -f1) && [[ -n $address ]] || return 1
    found=$(ip -o route get "$address" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n1)
    [[ $found != lo ]] || found=$(ip -o address show to "$address" | cut -d' ' -f2 | head -n1)
    [[ -n $found && $found != lo ]] && export GLOO_SOCKET_IFNAME=$found
}
