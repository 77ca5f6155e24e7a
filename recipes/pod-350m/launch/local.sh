#!/bin/sh
# One machine. Exit code 75: preempted, run it again; 76: the loss was not finite.
set -eu
cd "$(dirname "$0")/../../.."
exec python -m unimm.training.pod --standalone --nproc-per-node "${GPUS:-8}" -- \
    fit -c recipes/pod-350m/config.yaml --trainer.devices "${GPUS:-8}" --trainer.num_nodes 1 "$@"
