#!/bin/sh
# One machine. Exit code 75: preempted, run it again; 76: the loss was not finite.
set -eu
cd "$(dirname "$0")/../../.."
exec python -m unimm.training.pod --standalone --nproc-per-node "${GPUS:-1}" -- \
    fit -c recipes/audio/speech-16khz.yaml --trainer.devices "${GPUS:-1}" --trainer.num_nodes 1 "$@"
