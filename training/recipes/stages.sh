# Shared by the recipes: each stage is a run of the training loop, and a run that is complete is not repeated.
#
# Usage in a recipe: stage NAME CONFIG [FIELD...], which writes $out/NAME and resumes it after a kill.

data=$1 out=$2
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
launcher=(accelerate launch)
command -v nvidia-smi > /dev/null || launcher+=(--config_file "$here/accelerate/cpu.yaml")

# Stop unless the files exist, before any stage: check_files FILE...
check_files() {
    local file
    for file in "$@"; do
        [ -e "$file" ] || { echo "$0: $file: no such file or folder" >&2; exit 2; }
    done
}
check_files "$data"

stage() {
    local name=$1 config=$2
    shift 2
    echo "== $name"
    "${launcher[@]}" "$here/train.py" --config "$config" --dataset "$data" --output_dir "$out/$name" \
        --resume auto "$@"
}

# A variant after the stage PRESET_texts, for one epoch unless a field says otherwise: variant PRESET VARIANT [FIELD...]
variant() {
    local preset=$1 name=$1_$2
    shift 2
    stage "$name" "$name" --init_from "$out/${preset}_texts/last" --seed 1 \
        --num_train_epochs 1 --learning_rate 1.5e-3 --muon_learning_rate 1.5e-3 "$@"
}
