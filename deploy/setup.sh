#!/usr/bin/env bash
# Sets up a virtual environment with all that Milpa needs, and the system packages where it may install them.
#   setup.sh demo    what `make demo` needs
#   setup.sh dev     what `make test` needs as well: linters, a browser, a database server
# Reads PYTHON (an interpreter of version 3.11 or 3.12) and VENV (the folder to make). Run again, it does only what is missing.
set -euo pipefail
profile=${1:?demo or dev}
python=${PYTHON:-python3.11}
venv=${VENV:-.venv}
wheels=${MILPA_WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/milpa/wheels}
say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null ||
  fail "Python 3.11 or 3.12 is needed; name one with: make PYTHON=/path/to/python3.11"
command -v cc >/dev/null || command -v gcc >/dev/null ||
  fail "a C and C++ compiler is needed to build llama.cpp: apt-get install build-essential"

# --- system packages -------------------------------------------------------------------------------------------------
packages=()
[ -x /usr/sbin/mosquitto ] || command -v mosquitto >/dev/null || packages+=(mosquitto)
if [ "$profile" = dev ]; then
  command -v chromium >/dev/null || packages+=(chromium)
  command -v strace >/dev/null || packages+=(strace)
  command -v systemd-analyze >/dev/null || packages+=(systemd)
  command -v apertium >/dev/null && [ -d /usr/share/apertium/apertium-eng-spa ] || packages+=(apertium-eng-spa)
  ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || packages+=(postgresql)
fi
"$python" -m venv --help >/dev/null 2>&1 || packages+=(python3-venv)
if [ ${#packages[@]} -gt 0 ]; then
  as_root=()
  [ "$(id -u)" = 0 ] || as_root=(sudo -n)
  if command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null; then
    say "installing system packages: ${packages[*]}"
    "${as_root[@]}" apt-get update -qq || say "apt-get update failed; trying with the lists at hand"
    for package in "${packages[@]}"; do
      "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
        say "could not install $package; what needs it will say so"
    done
  else
    say "missing and not mine to install: ${packages[*]} (sudo apt-get install ${packages[*]}); the simulator's own broker stands in for mosquitto"
  fi
fi

# --- Python ----------------------------------------------------------------------------------------------------------
[ -x "$venv/bin/python" ] || { say "making $venv"; "$python" -m venv "$venv"; }
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install -q --upgrade 'pip>=24' wheel 2>/dev/null || "${pip[@]}" install -q wheel
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}

mkdir -p "$wheels"
if ! "$venv/bin/python" -c 'import llama_cpp' 2>/dev/null; then
  if ! ls "$wheels"/llama_cpp_python-*.whl >/dev/null 2>&1; then
    say "building llama.cpp once (about 6 minutes on 2 cores); the wheel is kept in $wheels"
    CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) "${pip[@]}" wheel -q --no-deps -c constraints.txt -w "$wheels" 'llama-cpp-python>=0.3.36,<0.4'
  fi
  say "installing llama.cpp"
  "${pip[@]}" install -q --find-links "$wheels" -c constraints.txt 'llama-cpp-python>=0.3.36,<0.4'
fi
say "installing Milpa and its libraries ($profile); torch is the large one"
"${pip[@]}" install -q --find-links "$wheels" -c constraints.txt -e ".[$profile]"

touch "$venv/.ready-$profile"
[ "$profile" = demo ] || touch "$venv/.ready-demo"
say "ready"
