# shellcheck shell=bash
# To be sourced. gloo takes the address that the own host name leads to, which is often 127.0.1.1 or another network.

use_interface_to() { # HOST: let gloo use the interface on the way there, unless one was chosen
    local address found
    [[ -z "${GLOO_SOCKET_IFNAME:-}" ]] && command -v ip >/dev/null || return 0
    address=$(getent ahosts "$1" | head -n1 | cut -d' ' -f1) && [[ -n $address ]] || return 1
    found=$(ip -o route get "$address" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p')
    [[ -n $found && $found != lo ]] && export GLOO_SOCKET_IFNAME=$found
}
