#!/usr/bin/env bash
# What a machine with a GPU shows in less than ten minutes.
#
#   benchmarks/gpu.sh OUT                     # OUT: an empty folder for results
#   benchmarks/gpu.sh --small OUT             # every line on a CPU and a tiny model, as a rehearsal
#
# It runs the tests that need a GPU, searches the demo model from end to end, times the rungs, screens
# and prunes a random 7B Llama on the device, and sets 2:4 kernels against dense ones. OUT/steps.jsonl
# tells of each step its seconds and exit status; the step's own lines stand beside it. A step that
# fails or takes longer than its share ends alone, and the last line says how many did.
#
# PYTHON names the interpreter (python3 if left out), MODEL and TEXT what is searched (demo).

set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

small=false
if [ "${1:-}" = --small ]; then
    small=true
    shift
fi
if [ $# -ne 1 ] || { [ -e "$1" ] && [ -n "$(ls -A "$1")" ]; }; then
    echo "usage: benchmarks/gpu.sh [--small] OUT, where OUT is an empty folder" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
model=${MODEL:-demo}
text=${TEXT:-demo}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0
patience=1

# A step's name, the seconds that it may take, and its command.
step() {
    local name=$1 most=$(($2 * patience)) begin=$SECONDS status
    shift 2
    timeout "$most" "$@" >"$out/$name.log" 2>&1
    status=$?
    [ "$status" -eq 0 ] || failed=$((failed + 1))
    printf '{"step": "%s", "seconds": %d, "status": %d}\n' \
        "$name" $((SECONDS - begin)) "$status" | tee -a "$out/steps.jsonl"
}

searched=(--evaluation-tokens 4096 --test-tokens 8192 --budget 160)
sizes=(--formulas 14)
large=()
semi=(--models demo 7b --blocks 8 --tokens 1 2048 --repeats 10)
if $small; then
    # A rehearsal may run beside other work.
    patience=5
    # The tests' own tiny model, whose windows are short.
    "$python" - "$out" <<'PY' || exit 1
import sys
from pathlib import Path
from tests.tiny_models import save_tiny_model
folder = Path(sys.argv[1])
save_tiny_model("llama", folder / "model", max_position_embeddings=64)
lines = (f"Line {number} of a text for pruning." for number in range(400))
(folder / "text.txt").write_text("\n\n".join(lines))
PY
    model=$out/model text=$out/text.txt
    short=(--sequence-length 32 --calibration-tokens 256 --evaluation-tokens 256)
    searched=("${short[@]}" --test-tokens 256 --budget 8)
    sizes=("${short[@]}" --formulas 3)
    large=(--device cpu --blocks 2 --width 64 --formulas 4 --length 32 --windows 4)
    semi=(--models 7b --blocks 1 --tokens 1 --repeats 1)
fi

step tests 120 "$python" -m pytest -q -p no:cacheprovider -m gpu \
    tests/scoring/test_fused_gpu.py tests/models/test_semi_structured.py tests/searching/test_gpu.py
step search 150 "$python" -m prunezero search --model "$model" --text "$text" --sparsity 0.5 \
    "${searched[@]}" --name gpu --runs-dir "$out/runs" --json "$out/search.json"
step rungs 80 "$python" benchmarks/rungs.py --model "$model" --text "$text" --dtype auto \
    "${sizes[@]}" --json "$out/rungs.json"
step large 170 "$python" benchmarks/large.py "${large[@]}" --json "$out/large.jsonl"
step semi_structured 60 "$python" benchmarks/semi_structured.py "${semi[@]}" \
    --json "$out/semi_structured.json"

echo "$failed steps failed; $out/steps.jsonl, and a .log of each step beside it"
[ "$failed" -eq 0 ]
