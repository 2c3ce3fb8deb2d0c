#!/bin/sh
# Says what this machine lacks before `make install` can work, and the line that installs it.
# fastecdsa and miniupnpc, which libp2p needs, are compiled: hence gcc, Python.h and gmp.h.
set -u
python=${PYTHON:-python3}
missing=""

need() { # need DEBIAN_PACKAGE COMMAND...: the package is missing unless the command succeeds
  package=$1
  shift
  "$@" >/dev/null 2>&1 || missing="$missing $package"
}

has_header() { # has_header NAME [FOLDER]
  printf '#include <%s>\n' "$1" | gcc ${2:+-I"$2"} -E -x c -
}

if ! command -v "$python" >/dev/null 2>&1; then
  missing="python3 python3-venv"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "AIVillage needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1)." >&2
  echo "Next: install a newer one and say PYTHON=python3.12 make install" >&2
  exit 1
else
  need python3-venv "$python" -c 'import venv, ensurepip'
fi
need git command -v git
need make command -v make
need gcc command -v gcc
if command -v gcc >/dev/null 2>&1; then
  need libc6-dev has_header stdio.h
  need libgmp-dev has_header gmp.h
  if command -v "$python" >/dev/null 2>&1; then
    need python3-dev has_header Python.h \
      "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
  fi
else
  missing="$missing libc6-dev libgmp-dev python3-dev"
fi

if [ -n "$missing" ]; then
  echo "This machine lacks:$missing" >&2
  echo "Next: apt-get install -y$missing" | sed 's/-y\([^ ]\)/-y \1/' >&2
  echo "(names as in Debian and Ubuntu; put sudo in front if you are not root)" >&2
  exit 1
fi
