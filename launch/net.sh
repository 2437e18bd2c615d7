# shellcheck shell=bash
# To be sourced: ports and network interfaces.

port_in_use() { # PORT: some listener has it, on whatever address
    grep -qi "^ *[0-9]*: [0-9a-f]*:$(printf %04X "$1") [0-9a-f:]* 0A" /proc/net/tcp /proc/net/tcp6 2>/dev/null
}

free_port() { # SEED: a free port below those that the system hands out by itself
    local port=$((15000 + $1 % 10000))
    while port_in_use "$port"; do port=$((port + 1)); done
    echo "$port"
}

# gloo takes the address that the own host name leads to, which is often 127.0.1.1 or of another network.
use_interface_to() { # HOST: let gloo use the interface on the way there, or that has its address, unless one was chosen
    local address found
    [[ -z "${GLOO_SOCKET_IFNAME:-}" ]] && command -v ip >/dev/null || return 0
    address=$(getent ahosts "$1" | head -n1 | cut -d' ' -f1) && [[ -n $address ]] || return 1
    found=$(ip -o route get "$address" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n1)
    [[ $found != lo ]] || found=$(ip -o address show to "$address" | cut -d' ' -f2 | head -n1)
    [[ -n $found && $found != lo ]] && export GLOO_SOCKET_IFNAME=$found
}
