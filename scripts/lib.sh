# Shared by the scripts in this directory. Source it under `set -euo pipefail`.

say() { printf '%s\n' "$*" >&2; }

# need_go makes sure that there is a Go to build with.
need_go() {
  command -v go >/dev/null || PATH=$PATH:/usr/local/go/bin
  if ! command -v go >/dev/null; then
    say "go is not installed; go.mod names the version, https://go.dev/dl/ has it."
    exit 1
  fi
}

# need_packages PACKAGE[=WHAT]… installs the Debian packages that are missing:
# those without WHAT, which is a command or a file, and the package's own name
# if it is not given. Only root can install; everybody else is told what to
# install.
need_packages() {
  local want missing=()
  PATH=$PATH:/usr/sbin:/sbin # not in every user's PATH
  for want in "$@"; do
    have "${want#*=}" || missing+=("${want%%=*}")
  done
  ((${#missing[@]})) || return 0
  if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    say "Please install: ${missing[*]} (Debian: apt-get install ${missing[*]}, as root)."
    exit 1
  fi
  say "Installing ${missing[*]} with apt-get. Their services are not started now;"
  say "Debian starts them at the next boot unless they are disabled (systemctl disable NAME)."
  (install_quietly "${missing[@]}") >&2
  for want in "$@"; do
    if ! have "${want#*=}"; then
      say "${want%%=*} is installed, but there is no ${want#*=}."
      exit 1
    fi
  done
}

have() { command -v "$1" >/dev/null || [[ $1 == /* && -e $1 ]]; }

# install_quietly installs packages without starting their services: Debian's
# redis-server would take 127.0.0.1:6379. It runs in a shell of its own, for its
# trap. A policy that the machine has already stays as it is; what was started
# under it is stopped.
install_quietly() {
  local policy=/usr/sbin/policy-rc.d ours=false package
  if (set -o noclobber && printf '#!/bin/sh\n# Temporary: no service starts while packages are being installed.\nexit 101\n' >"$policy") 2>/dev/null; then
    ours=true
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    chmod 755 "$policy"
  fi
  export DEBIAN_FRONTEND=noninteractive
  local install=(apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "$@")
  "${install[@]}" || { apt-get -q -o DPkg::Lock::Timeout=300 update && "${install[@]}"; }
  if ! $ours; then
    for package in "$@"; do
      package=${package%.io} # docker.io's is docker
      if [[ -e /etc/init.d/$package ]]; then
        service "$package" stop || true # it may not have been started
      fi
    done
  fi
}
