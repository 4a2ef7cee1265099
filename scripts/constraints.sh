#!/usr/bin/env bash
# constraints.sh -- writes constraints.txt and constraints-build.txt again: the newest versions that setup.cfg and
# pyproject.toml allow on Python 3.11 and newer, with the hashes of all their files. Needs uv (PyPI), which it installs
# into a folder that it removes.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work"
"$work/bin/pip" install -q --disable-pip-version-check --no-input 'uv>=0.9'
export SSL_CERT_FILE=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}

compile() { # OUTPUT SOURCE
  {
    echo "# Written by \`make constraints\`. pip --require-hashes takes it; scripts/pip.sh, the Dockerfile and make dist do."
    # win-inet-pton is PySocks' for Windows
    "$work/bin/uv" pip compile -q --universal --python-version 3.11 --upgrade --generate-hashes --no-header \
      --no-annotate --no-emit-package win-inet-pton "$2"
  } >"$work/made"
  mv "$work/made" "$1"
}
compile constraints.txt setup.cfg
python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
  >"$work/build.in"
compile constraints-build.txt "$work/build.in"
