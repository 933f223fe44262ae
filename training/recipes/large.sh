#!/usr/bin/env bash
# large from random weights to both released checkpoints: bash training/recipes/large.sh DATA OUT [TEXT_FILE...]
#
# As mini.sh; the vision encoder grows from base's, and that from mini's (Net2Net). The checkpoints are
# OUT/large_short/best and OUT/large_long/best.
set -euo pipefail
source "$(dirname "$0")/stages.sh"

stage mini_vision mini_vision
grow_vision base mini_vision
grow_vision large base_vision
texts_and_variants large --patch_dropout 0.5
