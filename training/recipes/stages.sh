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
