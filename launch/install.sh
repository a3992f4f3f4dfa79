#!/bin/bash
# The package and its pinned dependencies in a clean environment, as the Dockerfile has them: install.sh FOLDER [EXTRAS]
# Run it where pyproject.toml is. PYTHON picks the interpreter (default python3).
set -euo pipefail
folder=$1 extras=${2:-gpu,serve,jobs}

"${PYTHON:-python3}" -m venv "$folder"
# DS_BUILD_OPS=0: as in the Makefile. Not editable: the source can go.
DS_BUILD_OPS=0 PIP_NO_CACHE_DIR=1 "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
  -c constraints-cpu.txt ".[$extras]"
rm -rf build ./*.egg-info

# What is there works and agrees; what nobody reads at run time goes.
"$folder/bin/python" -m pip check
"$folder/bin/haste" --version
find "$folder" -name __pycache__ -type d -prune -exec rm -rf {} +
find "$folder"/lib/python3*/site-packages -mindepth 2 -maxdepth 3 -type d -name tests -path '*/pandas/*' -prune -exec rm -rf {} +
