#!/usr/bin/env bash
# Starts N processes of the training command on this machine, as one run.
set -um # -m: without it, background processes would ignore SIGINT

if [[ $# -lt 1 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  cat >&2 <<'USAGE'
usage: launch/local.sh N [arguments of deepseek_jax.main ...]
  Starts N processes under jax.distributed. Process 0 prints here; the output of the others goes to
  files, which are shown if the run fails. SIGTERM, SIGINT and SIGHUP are sent to all, and all may
  save before they end. If one process fails, all stop. Where it was killed, or hung (exit code 76
  of the others), all start again from the last checkpoint, up to RESTARTS times (20); else the exit
  code of the process that failed first is returned.
example: launch/local.sh 2 --config=configs/v3_tiny.py --emulate_devices=4
USAGE
  exit 2
fi

count=$1
shift
restarts=${RESTARTS:-20}
lost=76 # exit code of main where another process hangs or is gone
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
logs=$(mktemp -d "${TMPDIR:-/tmp}/deepseek_jax.XXXXXX") || exit 1

alive=()
stopping=0 # 1 once a signal has asked all processes to stop
send() { # SIGNAL: to every process that still runs
  ((${#alive[@]})) && kill -s "$1" "${alive[@]}" 2>/dev/null
}
trap 'stopping=1; send TERM' TERM
trap 'stopping=1; send INT' INT
trap 'stopping=1; send HUP' HUP

start() { # ARGUMENTS: starts all processes
  # A free port below the range of ephemeral ports, another one for each attempt: a process that is
  # left of an earlier attempt does not find it.
  local port=$((20000 + RANDOM % 12000)) process command
  while (: <>"/dev/tcp/localhost/$port") 2>/dev/null; do
    port=$((20000 + RANDOM % 12000))
  done
  for ((process = 0; process < count; process++)); do
    command=(python -m deepseek_jax.main "$@"
      "--coordinator=localhost:$port" "--processes=$count" "--process=$process")
    if ((process == 0)); then
      "${command[@]}" &
    else
      "${command[@]}" >"$logs/$process.log" 2>&1 &
    fi
    alive+=($!)
  done
}

code=0
end() { # waits until all have ended; the exit code of the first that failed is in `code`
  local deadline='' patience still pid
  code=0
  while ((${#alive[@]})); do
    still=()
    for pid in "${alive[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        still+=("$pid")
      elif ! wait "$pid" && ((code == 0)); then
        wait "$pid"
        code=$?
      fi
    done
    alive=(${still[@]+"${still[@]}"})
    if ((${#alive[@]} && (code || stopping && ${#alive[@]} < count))); then
      # The others see a failure and say whom they miss; after a signal all save and end together.
      # One that hangs or was stopped does neither, and does not react to SIGTERM.
      patience=$((stopping && code != lost ? 90 : 5))
      [[ -n $deadline ]] || deadline=$((SECONDS + patience))
      ((SECONDS < deadline)) || { send TERM && send CONT; }
      ((SECONDS < deadline + 10)) || send KILL
    fi
    ((${#alive[@]})) && sleep 0.2
  done
}

again() { # whether the run starts again: one process was killed, or others say that one hangs
  ((! stopping)) && ((code == lost || code > 128 && code != 130)) && ((restarts-- > 0))
}

attempt=0
start "$@"
end
while again; do
  attempt=$((attempt + 1))
  echo "local.sh: a process ended with code $code; all start again ($attempt)" >&2
  cat "$logs"/*.log 2>/dev/null | grep -m 1 '^error: ' >&2 # process 0 has said its own here
  start "$@"
  end
done

if ((code)) && ((! stopping)); then
  for log in "$logs"/*.log; do
    [[ -s $log ]] && printf -- '--- process %s, last lines of %s\n' "$(basename "$log" .log)" \
      "$log" && tail -n 20 "$log"
  done >&2
else
  rm -rf "$logs"
fi
exit "$code"
