#!/usr/bin/env bash
# A server on two nodes (docs/nodes.md), the same on both but for the node's number:
#   MODEL=... MASTER=host-of-node-0:5000 examples/two_nodes.sh 0 | 1 [flags]
# Flags that are given replace those here; requests go to node 0. These are for MLA on 2 x 8 GPUs;
# GQA with 8 key-value heads: --dcp-size 2.
set -euo pipefail
node=${1:?the number of this node, 0 or 1}
exec python -m sglang.launch_server --model-path "$MODEL" --tp 16 --dcp-size 8 \
  --dcp-comm-backend a2a --nnodes 2 --node-rank "$node" --dist-init-addr "$MASTER" \
  --host 0.0.0.0 --port 30000 "${@:2}"
