#!/usr/bin/env bash
# Prefill on one server, decode on another (docs/deployment.md), for MLA (DeepSeek, Kimi): the decode
# server stores each token once. Each role on its own host, or all on one (one_machine.sh):
#   MODEL=... examples/pd_mla.sh prefill | decode [flags]
#   PREFILL=host:30000 DECODE=host:30000 examples/pd_mla.sh router [flags]
# Flags that are given replace those here. Model, --page-size and --kv-cache-dtype are the same on
# both servers. BOOTSTRAP is the port at which they meet, at the prefill server's host.
set -euo pipefail
bootstrap=${BOOTSTRAP:-8998}
case ${1:?prefill, decode or router} in
  prefill) exec python -m sglang.launch_server --model-path "$MODEL" --tp 8 \
    --disaggregation-mode prefill --disaggregation-bootstrap-port "$bootstrap" \
    --host 0.0.0.0 --port 30000 "${@:2}" ;;
  decode) exec python -m sglang.launch_server --model-path "$MODEL" --tp 8 --dcp-size 8 \
    --dcp-comm-backend a2a --disaggregation-mode decode --host 0.0.0.0 --port 30000 "${@:2}" ;;
  router) exec python -m sglang_router.launch_router --pd-disaggregation \
    --prefill "http://$PREFILL" "$bootstrap" --decode "http://$DECODE" --port 8000 "${@:2}" ;;
esac
