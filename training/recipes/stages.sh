# Shared by the recipes: each stage is a run of the training loop, and a run that is complete is not repeated.
#
# Usage in a recipe: stage NAME CONFIG [FIELD...], which writes $out/NAME and resumes it after a kill.

[ $# -ge 2 ] || { echo "usage: bash $0 DATA OUT [TEXT_FILE...]" >&2; exit 2; }
data=$1 out=$2
shift 2
for file in "$data" "$@"; do
    [ -e "$file" ] || { echo "$0: $file: no such file or folder" >&2; exit 2; }
done
texts=("$@")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
launcher=(accelerate launch)
command -v nvidia-smi > /dev/null || launcher+=(--config_file "$here/accelerate/cpu.yaml")

stage() {
    local name=$1 config=$2
    shift 2
    echo "== $name"
    "${launcher[@]}" "$here/train.py" --config "$config" --dataset "$data" --output_dir "$out/$name" \
        --resume auto "$@"
}

# The vision encoder of a preset, grown from that of a smaller one: grow_vision PRESET STAGE
grow_vision() {
    stage "$1_vision" mini_vision --preset "$1" --grow_from "$out/$2/last" --patch_dropout 0.5 --num_train_epochs 4
}

# The decoder, all texts of the images, and each variant, after the stage PRESET_vision.
# texts_and_variants PRESET [FIELD...], with fields of the stages that see images
texts_and_variants() {
    local preset=$1 before=$1_vision
    shift
    if [ ${#texts[@]} -gt 0 ]; then
        stage "${preset}_decoder" mini_decoder --preset "$preset" --init_from "$out/$before/last" \
            --texts short long captions "${texts[@]}"
        before=${preset}_decoder
    fi
    stage "${preset}_texts" "${preset}_texts" --init_from "$out/$before/last" "$@"
    for variant in short long; do
        stage "${preset}_$variant" "${preset}_$variant" --init_from "$out/${preset}_texts/last" --seed 1 \
            --num_train_epochs 1 --learning_rate 1.5e-3 --muon_learning_rate 1.5e-3 "$@"
    done
}
