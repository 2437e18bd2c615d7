# shellcheck shell=bash
# To be sourced by the scripts here, in the checkout: SETUP, PYTHON and CONTAINER, as described in train.sh.
if [[ -n "${SETUP:-}" ]]; then
    # shellcheck disable=SC1090
    source "$SETUP"
fi
[[ -n "${PYTHON:-}" || ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
PYTHON=${PYTHON:-python3}
# shellcheck disable=SC2034
read -ra container <<<"${CONTAINER:-}"
