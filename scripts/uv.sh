#!/usr/bin/env bash
# uv with pip's own settings (indexes, folders of wheels, certificates), of which it reads none by itself: where pip finds a
# package, such as a CPU build of torch, so does uv.
set -euo pipefail
bin=$(cd -P "$(dirname "$0")/../.venv/bin" && pwd)
settings=$("$bin/pip" config list)

setting() { # setting NAME: pip's value, of the environment before the files
  local section value
  for section in :env: install global; do
    value=$(sed -n "s/^$section\.$1='\(.*\)'$/\1/p" <<<"$settings")
    if [[ $value ]]; then
      echo "${value//\\n/ }"
      return
    fi
  done
}

give() { # give VARIABLE VALUE: to uv, unless the variable or the value is missing
  if [[ ! -v $1 && $2 ]]; then export "$1=$2"; fi
}

wheels=$(xargs <<<"$(setting find-links)")
give UV_FIND_LINKS "${wheels// /,}"
give UV_DEFAULT_INDEX "$(setting index-url)"
give UV_INDEX "$(setting extra-index-url)"
give UV_INDEX_STRATEGY unsafe-best-match # the best version of all indexes, as pip takes
give UV_NO_INDEX "$(setting no-index)"
give SSL_CERT_FILE "$(setting cert)"
give UV_HTTP_TIMEOUT "$(setting default-timeout)"
give VIRTUAL_ENV "${bin%/bin}"
exec "$bin/uv" "$@"
