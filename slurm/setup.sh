# shellcheck shell=bash
# Applies SETUP, PYTHON and CONTAINER, which train.sh describes. The scripts here source it in the checkout.
if [[ -n "${SETUP:-}" ]]; then
    # shellcheck disable=SC1090
    source "$SETUP"
fi
[[ -n "${PYTHON:-}" || ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
PYTHON=${PYTHON:-python3}
# shellcheck disable=SC2034
read -ra container <<<"${CONTAINER:-}"
