#!/usr/bin/env bash
# `make release-check`: what is released is whole. Says what it checked; ends with 1 at the first thing that is wrong.
# Usage: deploy/release_check.sh PYTHON, after `make wheel`. Pip's own settings decide where packages come from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(realpath --no-symlinks "$1")
checkout=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

checked() { echo "checked: $*"; }
failed() { echo "release-check: $*" >&2; exit 1; }

version=$("$python" -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
top=$(grep -m1 -E '^## \[' CHANGELOG.md)
[[ $top == "## [$version]"* ]] || failed "pyproject.toml has version $version, the top of CHANGELOG.md is '$top'"
checked "CHANGELOG.md begins with $version"
[[ $top =~ [0-9]{4}-[0-9]{2}-[0-9]{2}$ ]] || echo "NOTE: its entry has no date yet; a release needs one"

wheel=$(ls "$checkout"/dist/easyspec-"$version"-*linux*.whl) || failed "no wheel of $version with the built library"
checked "wheel $(basename "$wheel"), $(du -k "$wheel" | cut -f1) KiB"

"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet -c constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "$wheel"
cd "$work" # not the checkout: its folders would be found instead of the installation
installed=$(venv/bin/easyspec --version)
[[ $installed == "easyspec $version" ]] || failed "the installed command says '$installed', not 'easyspec $version'"
checked "installation in a new environment: $installed"
venv/bin/pip check >/dev/null || failed "the installation has packages that do not fit: see 'pip check'"
venv/bin/python -c '
import sys
from easyspec.ops.native_library import library_problem
sys.exit(library_problem())' || failed "the installed library does not load"
checked "dependencies fit, the native library loads"
for role in gateway drafter_service verifier_service; do
  venv/bin/python -m "$role" --help >/dev/null || failed "python -m $role --help fails"
done
checked "gateway, drafter and verifier start as far as --help"

if engine=$(command -v docker || command -v podman) && "$engine" info >/dev/null 2>&1; then
  "$engine" build --quiet --tag "easyspec:$version" "$checkout" >/dev/null || failed "the image does not build"
  said=$("$engine" run --rm "easyspec:$version" easyspec --version)
  [[ $said == "easyspec $version" ]] || failed "the image says '$said'"
  checked "image easyspec:$version: $said"
else
  echo "NOTE: no container engine answers here; the image was not checked"
fi
echo "release-check: easyspec $version is whole"
