#!/usr/bin/env bash
# base from mini to both released checkpoints: bash training/recipes/base.sh DATA OUT MINI
#
# MINI is the checkpoint of mini that base grows from (Net2Net): mini-short, which the package contains, or
# OUT/mini_short/best of mini.sh. An interrupted recipe resumes where it stopped. The checkpoints are
# OUT/base_short/best and OUT/base_long/best.
set -euo pipefail
[ $# -eq 3 ] || { echo "usage: bash $0 DATA OUT MINI" >&2; exit 2; }
source "$(dirname "$0")/stages.sh"

stage base_texts base_texts --grow_from "$1" --patch_dropout 0.5 --num_train_epochs 1.5
# With all patches, as the encoder sees them in use.
quarter=(--num_train_epochs 0.25 --warmup_steps 20 --save_steps 50)
variant base short "${quarter[@]}"
variant base long "${quarter[@]}"
