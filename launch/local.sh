#!/usr/bin/env bash
# Starts N processes of the training command on this machine, as one run.
set -um # -m: without it, background processes would ignore SIGINT

if [[ $# -lt 1 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  cat >&2 <<'USAGE'
usage: launch/local.sh N [arguments of deepseek_jax.main ...]
  Starts N processes under jax.distributed. Process 0 prints here; the output of the others goes to
  files, which are shown if the run fails. SIGTERM, SIGINT and SIGHUP are sent to all, and all may
  save before they end. If one process fails, all stop, and its exit code is returned.
example: launch/local.sh 2 --config=configs/v3_tiny.py --emulate_devices=4
USAGE
  exit 2
fi

count=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
logs=$(mktemp -d "${TMPDIR:-/tmp}/deepseek_jax.XXXXXX") || exit 1

# A free port below the range of ephemeral ports.
port=$((20000 + RANDOM % 12000))
while (: <>"/dev/tcp/localhost/$port") 2>/dev/null; do
  port=$((20000 + RANDOM % 12000))
done

alive=()
stopping= # set once a signal has asked all processes to stop
send() { # SIGNAL: to every process that still runs
  ((${#alive[@]})) && kill -s "$1" "${alive[@]}" 2>/dev/null
}
trap 'stopping=1; send TERM' TERM
trap 'stopping=1; send INT' INT
trap 'stopping=1; send HUP' HUP

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

code=0
deadline=
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
  if ((code && ${#alive[@]})) && [[ -z $stopping ]]; then
    # A process that waits for a dead peer in a collective does not react to SIGTERM.
    [[ -n $deadline ]] || { deadline=$((SECONDS + 10)) && send TERM; }
    ((SECONDS < deadline)) || send KILL
  fi
  ((${#alive[@]})) && sleep 0.2
done

if ((code)) && [[ -z $stopping ]]; then
  for log in "$logs"/*.log; do
    [[ -s $log ]] && printf -- '--- process %s, last lines of %s\n' "$(basename "$log" .log)" \
      "$log" && tail -n 20 "$log"
  done >&2
else
  rm -rf "$logs"
fi
exit "$code"
