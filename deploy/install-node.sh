#!/usr/bin/env bash
# Installs a Milpa node as a systemd service. Run again, it does only what is missing or changed; nothing an operator edited is touched.
#   install-node.sh [--source WHEEL|FOLDER] [--train] [--timers]     install or upgrade, and start
#   install-node.sh --uninstall                                      remove program and units; settings, secrets and data stay
# --train   also what a node needs to learn at its site: torch and others, about 1 GB. Once given, upgrades keep it.
# --timers  train and sync at a set hour, for `learn.auto = false`; brings --train
# Options for packagers and tests:
#   --root FOLDER          lay the files under FOLDER, and start nothing
#   --environment FOLDER   use this Python environment instead of making one
#   --python PROGRAM       Python 3.11 or 3.12 (default: python3.11, else python3)
# Files: /usr/local/lib/milpa (program), /usr/local/bin/milpa-node, /etc/systemd/system/milpa-*, /etc/milpa (settings), /var/lib/milpa (data).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root='' environment='' python='' source=$(dirname "$here") train=no timers=no uninstall=no
say() { printf '==> %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
while [ $# -gt 0 ]; do
  case $1 in
    --root | --environment | --python | --source)
      [ $# -ge 2 ] || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --train) train=yes; shift ;;
    --timers) timers=yes; shift ;;
    --uninstall) uninstall=yes; shift ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "unknown option $1; see --help" ;;
  esac
done
root=${root%/}
library=$root/usr/local/lib/milpa program=$root/usr/local/bin/milpa-node units=$root/etc/systemd/system settings=$root/etc/milpa
names=(milpa-node.service milpa-learn.service milpa-learn.timer)
live() { [ -z "$root" ] && [ -d /run/systemd/system ]; }
[ -n "$root" ] || [ "$(id -u)" = 0 ] || fail "run it as root: sudo $0"
[ $train = no ] || [ -z "$environment" ] || fail "--train installs nothing into $environment: install milpa with its extra 'train' there"

if [ $uninstall = yes ]; then
  if live; then systemctl disable --quiet --now milpa-learn.timer milpa-node.service 2>/dev/null || true; fi
  for name in "${names[@]}"; do rm -f "$units/$name"; done
  rm -f "$program"
  rm -rf "$library"
  if live; then systemctl daemon-reload; fi
  say "removed; settings stay in $settings, data in $root/var/lib/milpa (to forget them too: rm -r)"
  exit 0
fi

# --- the program -----------------------------------------------------------------------------------------------------
changed=no
if [ -z "$environment" ]; then
  environment=$library/venv
  [ -n "$python" ] || python=$(command -v python3.11 || command -v python3) || fail "Python 3.11 or 3.12 is needed: apt-get install python3-venv"
  "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' ||
    fail "$python is not Python 3.11 or 3.12; name one with --python"
  [ -x "$environment/bin/python" ] || { say "making $environment"; mkdir -p "$library"; "$python" -m venv "$environment"; }
  say "installing Milpa from $source (the first time llama.cpp is built: minutes on a small board)"
  pins=()
  [ ! -f "$here/../constraints.txt" ] || pins=(-c "$here/../constraints.txt")
  trained=("$environment"/lib/python3*/site-packages/torch)
  extra=''
  if [ $train = yes ] || [ $timers = yes ] || [ -e "${trained[0]}" ]; then extra='[train]'; fi
  # what every installed file is, by its SHA-256: pip lays the same program anew, and a node need not restart for that
  contents() { cat "$environment"/lib/python3*/site-packages/*.dist-info/RECORD 2>/dev/null | sha256sum; }
  before=$(contents)
  "$environment/bin/python" -m pip --disable-pip-version-check install -q --upgrade "${pins[@]}" "$source$extra"
  [ "$before" = "$(contents)" ] || changed=yes
fi
[ -x "$environment/bin/milpa-node" ] || fail "$environment has no milpa-node; install the package milpa there"

# lay MODE FROM TO: copy if it differs; remembers that something changed
lay() { if ! cmp -s "$2" "$3"; then install -D -m "$1" "$2" "$3"; changed=yes; say "wrote $3"; fi; }
mkdir -p "$(dirname "$program")"
if [ "$(readlink "$program" || true)" != "${environment#"$root"}/bin/milpa-node" ]; then
  ln -sfn "${environment#"$root"}/bin/milpa-node" "$program"
  changed=yes
fi
for name in "${names[@]}"; do lay 644 "$here/systemd/$name" "$units/$name"; done
install -d -m 755 "$settings"
install -d -m 700 "$settings/secrets"
[ -e "$settings/node.toml" ] || lay 644 "$here/systemd/node.toml" "$settings/node.toml"
"$environment/bin/milpa-node" config check --config "$settings/node.toml" >&2 || fail "correct $settings/node.toml, then run this again"

# --- the service -----------------------------------------------------------------------------------------------------
if live; then
  systemctl daemon-reload
  systemctl enable --quiet milpa-node.service
  [ $timers = no ] || systemctl enable --quiet --now milpa-learn.timer
  if [ $changed = yes ]; then systemctl restart milpa-node.service; else systemctl start milpa-node.service; fi
  say "running; how it is: milpa-node status; what is wrong: sudo milpa-node doctor"
elif [ $changed = yes ]; then
  say "laid under ${root:-/}; no systemd runs here, so nothing was started"
else
  say "nothing to do"
fi
