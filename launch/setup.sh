#!/usr/bin/env bash
# Creates or reuses .venv in the project root, with an editable install of mpo_jax at the versions in constraints.txt.
#
#   bash launch/setup.sh [EXTRA ...]     e.g.  setup.sh    setup.sh test    setup.sh test cuda12
#
# Extras are those of pyproject.toml; they add up over calls. If everything is already installed, nothing happens.
# PYTHON names the interpreter (3.11 or later). Unfinished or moved environments are rebuilt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$(pwd -P)
stamp=.venv/mpo-setup.stamp           # written last: exists only after a complete setup
unfinished=.venv/mpo-setup.unfinished # exists during setup

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# One setup at a time (the lock is released when this process ends).
if command -v flock >/dev/null 2>&1 && { exec 9<>constraints.txt; } 2>/dev/null; then
  flock -n 9 2>/dev/null || { echo "setup: waiting for another setup of this folder"; flock 9 || true; }
fi

base=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
  if recent "$candidate"; then base=$candidate; break; fi
done
if [ -z "$base" ]; then
  found=$("${PYTHON:-python3}" --version 2>/dev/null) || found="not installed"
  fail "Python 3.11 or later is needed; ${PYTHON:-python3} is $found." \
    "Install it, or name it: PYTHON=/path/to/python3.11 bash launch/setup.sh"
fi

# Prints the action (reuse, install or rebuild), the key of the requested state, and the extras to install.
plan=$("$base" - "$root" "$stamp" "${PYTHON:+chosen}" "$@" <<'PY'
import hashlib, pathlib, sys, tomllib

root, stamp, chosen, *words = sys.argv[1:]
project, constraints = pathlib.Path("pyproject.toml").read_bytes(), pathlib.Path("constraints.txt").read_bytes()
known = set(tomllib.loads(project.decode())["project"]["optional-dependencies"])
wanted = set(" ".join(words).replace(",", " ").split())
if unknown := wanted - known:
    sys.exit(f"setup: no extra named {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")

key = hashlib.sha256(project + constraints).hexdigest()
python = f"{sys.version_info[0]}.{sys.version_info[1]}"
accelerators = {"cuda12", "cuda13", "tpu"}
try:
    old_root, old_python, old_key, old_extras = pathlib.Path(stamp).read_text().split("\n")[:4]
    old = set(old_extras.split()) & known
except (OSError, ValueError):
    action, extras = "install", wanted
else:
    extras = old | wanted
    if root != old_root or (chosen and python != old_python):
        action = "rebuild"
    elif wanted & accelerators and len(extras & accelerators) > 1:
        action, extras = "rebuild", (old - accelerators) | wanted
    else:
        action = "reuse" if key == old_key and wanted <= old else "install"
print(action, key, *sorted(extras))
PY
)
read -r action key extras <<<"$plan"

if [ -e "$unfinished" ] || { [ -e .venv ] && ! recent .venv/bin/python; }; then
  action=rebuild
fi
if [ "$action" = reuse ]; then
  echo "setup: .venv is up to date${extras:+ (extras: $extras)}"
  exit 0
fi

begin=$SECONDS
echo "setup: installing mpo_jax${extras:+ with the extras $extras} into .venv (about a minute on the first call)"
mkdir -p .venv
: >"$unfinished"
rm -f "$stamp"
if [ "$action" = rebuild ]; then
  find .venv/ -mindepth 1 ! -path "*/${unfinished#*/}" -delete
fi
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  "$base" -m venv .venv || fail "could not create a virtual environment with $base; it needs the modules venv and" \
    "ensurepip (on Debian and Ubuntu: apt install python3-venv)"
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-compile \
  -c constraints.txt -e ".${extras:+[${extras// /,}]}" \
  || fail "the installation failed (see above); the next call starts over"
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then
  # no process may write byte code, and then every start would spend seconds on compiling the packages
  .venv/bin/python -m compileall -q -j 0 .venv/lib || true
fi
.venv/bin/python - "$root" "$key" "$extras" >"$stamp.new" <<'PY'
import sys

root, key, extras = sys.argv[1:]
print(root, f"{sys.version_info[0]}.{sys.version_info[1]}", key, extras, sep="\n")
PY
rm -f "$unfinished"
mv "$stamp.new" "$stamp"
echo "setup: done in $((SECONDS - begin)) s"
