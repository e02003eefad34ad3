#!/usr/bin/env bash
# Makes .venv-rft/NAME: a framework in an environment of its own, as `make test-rft` needs it.
#
#   tools/rft_env.sh NAME...        PYTHON=… names another interpreter (3.11 or 3.12)
#
# NAME is trl, verl-0.9, verl-0.7, verl-0.5, opencompass, verifiers, trinity or areal. About 2 GB (verifiers 0.6 GB)
# and 2 to 5 minutes each. Does nothing where the folder was already made with the same packages.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

for name in "$@"; do
    # verl and Trinity ask for any torch; first, so that it is this one.
    first=("torch==2.13.0")
    without_dependencies=()
    # pyarrow 23 needs numpy 2, which verl 0.5 and 0.7 do not allow.
    case $name in
        trl) packages=("trl==1.16.0") ;;
        verl-0.9) packages=("verl==0.9.1") ;;
        verl-0.7) packages=("verl==0.7.0" "transformers<5" "pyarrow<23") ;;
        verl-0.5) packages=("verl==0.5.0" "transformers<5" "pyarrow<23") ;;
        opencompass) packages=("opencompass==0.5.4" "transformers<5" "pyarrow<23") ;;
        verifiers) first=(); packages=("verifiers==0.4.0") ;;
        trinity) packages=("trinity-rft==0.6.0") ;;
        areal)
            # It pins a torch with CUDA and a hundred packages; these are what its rollout workflow imports.
            packages=("transformers==5.3.0" "ray==2.60.0" "hydra-core==1.3.8" aiofiles aiohttp colorlog einops flask
                lark numba openai orjson pillow tenacity torchdata uvloop)
            without_dependencies=("areal==1.0.4") ;;
        *)
            echo "$name: must be trl, verl-0.9, verl-0.7, verl-0.5, opencompass, verifiers, trinity or areal" >&2
            exit 1 ;;
    esac
    folder=$here/../.venv-rft/$name
    stamp=$folder/.installed
    all=("${first[@]}" "${packages[@]}" "${without_dependencies[@]}")
    wanted="${all[*]}"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        continue
    fi
    "${PYTHON:-python3}" -m venv --clear "$folder"
    pip=("$folder/bin/python" -m pip install --disable-pip-version-check --quiet)
    if [ ${#first[@]} -gt 0 ]; then
        "${pip[@]}" "${first[@]}"
    fi
    "${pip[@]}" "${packages[@]}"
    if [ ${#without_dependencies[@]} -gt 0 ]; then
        "${pip[@]}" --no-deps "${without_dependencies[@]}"
    fi
    "${pip[@]}" -e "$here/.."
    echo "$wanted" > "$stamp"
done
