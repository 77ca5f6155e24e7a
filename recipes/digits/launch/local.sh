#!/bin/sh
# One machine. Exit code 75: preempted, run it again; 76: the loss was not finite.
set -eu
cd "$(dirname "$0")/../../.."
exec unimm fit -c recipes/digits/lm.yaml "$@"
