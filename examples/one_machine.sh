#!/usr/bin/env bash
# Router, prefill server and sharded decode server on this machine's CPU, a tiny random model, and a
# completion through all three:
#   [MODEL=another] [FLAGS="of both servers"] examples/one_machine.sh [pd_gqa | pd_mla] [command]
# A command runs behind that completion, with ROUTER, PREFILL and DECODE (host:port), MODEL and LOGS,
# a folder. It needs sglang-cpu-reference and sglang-router. On GPUs: the lines below with a MODEL of
# yours, without SGLANG_PLATFORM, and with CUDA_VISIBLE_DEVICES for each server.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
pd=./${1:-pd_gqa}.sh
[ "$pd" = ./pd_mla.sh ] && family=deepseek_v2 || family=llama
LOGS=$(mktemp -d)
mapfile -t ports < <(python -c 'from sglang_cpu_reference.server import free_port
for _ in range(5): print(free_port())')
export LOGS PREFILL=127.0.0.1:${ports[0]} DECODE=127.0.0.1:${ports[1]} ROUTER=127.0.0.1:${ports[2]}
export BOOTSTRAP=${ports[3]} MODEL=${MODEL:-} SGLANG_PLATFORM=cpu_reference OMP_NUM_THREADS=1
end() {
  kill $(jobs -p) 2>/dev/null || true
  wait
  rm -r "$LOGS"
}
trap end EXIT
if [ -z "$MODEL" ]; then
  MODEL=$LOGS/model
  python -c 'import sys
from sglang_cpu_reference.checkpoints import make_checkpoint
make_checkpoint(*sys.argv[1:])' "$family" "$MODEL"
fi
start() { # ROLE [flags]
  "$pd" "$@" --host 127.0.0.1 >"$LOGS/$1.log" 2>&1 &
}
# Unquoted: several flags.
start prefill --tp 1 --port "${PREFILL#*:}" ${FLAGS:-}
start decode --tp 2 --dcp-size 2 --port "${DECODE#*:}" ${FLAGS:-}
start router --port "${ROUTER#*:}" --prometheus-port "${ports[4]}"

answers() { curl -sf -o /dev/null "http://$1"; }
for address in "$PREFILL/health" "$DECODE/health" "$ROUTER/readiness"; do
  until answers "$address"; do
    if [ "$(jobs -pr | wc -l)" -lt 3 ]; then
      tail -n 20 "$LOGS"/*.log | cut -c -200 >&2
      exit 1
    fi
    sleep 1
  done
  echo "$address is up after $SECONDS s" >&2
done
curl -s "http://$ROUTER/generate" -H "Content-Type: application/json" -d \
  '{"text": "Sequence-sharded caches", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}'
echo
if [ $# -gt 1 ]; then
  "${@:2}"
fi
