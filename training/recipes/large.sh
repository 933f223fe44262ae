#!/usr/bin/env bash
# large from base to both released checkpoints: bash training/recipes/large.sh DATA OUT BASE
#
# BASE is the checkpoint of base that large grows from (Net2Net): base-short, which is in this repository, or
# OUT/base_short/best of base.sh. An interrupted recipe resumes where it stopped. The checkpoints are
# OUT/large_short/best and OUT/large_long/best.
set -euo pipefail
[ $# -eq 3 ] || { echo "usage: bash $0 DATA OUT BASE" >&2; exit 2; }
source "$(dirname "$0")/stages.sh"

stage large_texts large_texts --grow_from "$1" --patch_dropout 0.5
variant large short --patch_dropout 0.5
variant large long --patch_dropout 0.5
