#!/usr/bin/env bash
# base from random weights to both released checkpoints: bash training/recipes/base.sh DATA OUT [TEXT_FILE...]
#
# As mini.sh; the vision encoder grows from mini's (Net2Net). The checkpoints are
# OUT/base_short/best and OUT/base_long/best.
set -euo pipefail
source "$(dirname "$0")/stages.sh"

stage mini_vision mini_vision
grow_vision base mini_vision
texts_and_variants base --patch_dropout 0.5
