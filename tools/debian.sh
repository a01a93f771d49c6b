#!/usr/bin/env bash
# Install the Debian packages that are named and missing: debian.sh PACKAGE... What cannot be
# installed (no root, no Debian, no network) is said, and is no failure: the tests that want it skip.
set -euo pipefail

say() { printf 'setup: %s\n' "$*" >&2; }

installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q 'ok installed'; }

install_all() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1
}

command -v dpkg-query >/dev/null 2>&1 || { say "not Debian or Ubuntu: no system package is installed"; exit 0; }
missing=()
for name in "$@"; do
    installed "$name" || missing+=("$name")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" -ne 0 ]; then
    say "not root, so these Debian packages stay missing: ${missing[*]}"
    exit 0
fi
say "installing ${missing[*]}"
install_all "${missing[@]}" && exit 0
apt-get update -qq >&2 || say "apt-get update failed"
install_all "${missing[@]}" && exit 0
for name in "${missing[@]}"; do
    install_all "$name" || say "could not be installed, goes without: $name"
done
