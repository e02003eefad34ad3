#!/usr/bin/env bash
# Makes .venv-rft/NAME: a framework that trains policies, in an environment of its own, as `make test-rft` needs it.
#
#   tools/rft_env.sh NAME...        PYTHON=… names another interpreter (3.11 or 3.12)
#
# NAME is trl, verl-0.9, verl-0.7 or verl-0.5. About 2 GB and 2 to 5 minutes each. Does nothing where the
# folder was already made from this script.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
wanted=$(cksum < "${BASH_SOURCE[0]}")

for name in "$@"; do
    # pyarrow 23 needs numpy 2, which verl 0.5 and 0.7 do not allow.
    case $name in
        trl) packages=("trl==1.16.0") ;;
        verl-0.9) packages=("verl==0.9.1") ;;
        verl-0.7) packages=("verl==0.7.0" "transformers<5" "pyarrow<23") ;;
        verl-0.5) packages=("verl==0.5.0" "transformers<5" "pyarrow<23") ;;
        *) echo "$name: must be trl, verl-0.9, verl-0.7 or verl-0.5" >&2; exit 1 ;;
    esac
    folder=$here/../.venv-rft/$name
    stamp=$folder/.installed
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        continue
    fi
    "${PYTHON:-python3}" -m venv --clear "$folder"
    pip=("$folder/bin/python" -m pip install --disable-pip-version-check --quiet)
    # verl asks for any torch; first, so that it is this one.
    "${pip[@]}" "torch==2.13.0"
    "${pip[@]}" "${packages[@]}"
    "${pip[@]}" -e "$here/.."
    echo "$wanted" > "$stamp"
done
