#!/usr/bin/env bash
# pip.sh VENV install|wheel [OPTION…] -- installs this checkout and its libraries into VENV, or makes their wheels there.
# Everything that is downloaded is checked against the hashes in constraints.txt: first setuptools, which builds what
# comes as source, then the libraries, then ovsmesh itself.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n 2,4p "$0" >&2; exit 2; }
pip=$1/bin/pip what=$2
shift 2

run() { "$pip" "$@" -q --disable-pip-version-check --no-input --retries 5; }
run install --require-hashes --only-binary :all: -r constraints-build.txt
run "$what" --require-hashes --no-build-isolation --use-pep517 -r constraints.txt "$@"
run "$what" --no-deps --no-build-isolation --use-pep517 . "$@"
