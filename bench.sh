#!/usr/bin/env bash
# Measures what a GPU can show, in order of worth, for at most --minutes (15), and stops by itself:
#
#     bash bench.sh --minutes=12 --out=results/bench
#
# Every step has a time limit of its own and writes its tables as it goes. A step that fails costs no other one. Started
# again with the same --out, it goes on with the steps that are not done. --tiny runs all steps at sizes for a CPU: try
# that first, since a GPU is expensive. --nanogpt=PATH compares with a clone of nanoGPT, too.
cd "$(dirname "$0")" || exit
minutes=15 out=results/bench tiny= peers=()
for flag; do
  case $flag in
    --minutes=*) minutes=${flag#*=} ;;
    --out=*) out=${flag#*=} ;;
    --tiny) tiny=1 ;;
    --nanogpt=*) peers+=("$flag") ;;
    *) echo "bench.sh: unknown flag $flag; there are --minutes=, --out=, --nanogpt= and --tiny" >&2; exit 2 ;;
  esac
done
[[ $minutes =~ ^[0-9]+$ ]] || { echo "bench.sh: --minutes takes a whole number, not '$minutes'" >&2; exit 2; }
end=$((SECONDS + 60 * minutes)) failed=
mkdir -p "$out"

step() {  # step NAME SECONDS COMMAND…
  local name=$1 limit=$2 left=$((end - SECONDS))
  shift 2
  if grep -qsx "$name" "$out/steps_done"; then echo "== $name: done before"; return; fi
  if ((left < limit)); then limit=$left; fi
  if ((limit < 20)); then echo "== $name: no time left"; return; fi
  echo "== $name, at most $limit s"
  # bench.py and tune.py know how long they may take; what does not listen is stopped
  local budget=()
  [[ $1 == python && $2 != -m ]] && budget=(--seconds=$((limit * 8 / 10)) --out="$out")
  if timeout --kill-after=5 "$limit" "$@" "${budget[@]}"; then
    echo "$name" >> "$out/steps_done"
  else
    echo "== $name: failed or out of time, exit code $?"; failed+=" $name"
  fi
}

if [[ $tiny ]]; then
  small=$out/tiny.py large=$out/tiny.py mixture=$out/tiny.py
  printf 'n_layer, n_head, n_embd, vocab_size, block_size, micro_batch = 1, 2, 16, 32, 8, 2\n' > "$out/tiny.py"
  short=(--rounds=3) tune=(--widths=32,48 --elements=512 --rounds=1)
  export TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1  # kernels in Python, and nothing compiled
else
  small=llama_0.12b large=llama_1b mixture=moe_0.5b short=() tune=()
fi
few="baseline,unified,unified --head_placement=input"

step gpu_tests 60 python -m pytest -o addopts= -q -x -rs tests/test_gpu.py
step overhead 240 python bench.py overhead --ways=compiled --sizes="$small" "${short[@]}"
step tune 90 python results/tune.py "${tune[@]}"
step kernels 75 python bench.py kernels --sizes="$small" --tuned="$out/tune.json" "${short[@]}"
step peers 90 python bench.py peers --ways=compiled --sizes="$small" "${short[@]}" "${peers[@]}"
step overhead_large 100 python bench.py overhead --ways=compiled --sizes="$large" --strategies="$few" "${short[@]}"
step overhead_moe 100 python bench.py overhead --ways=compiled --sizes="$mixture" --strategies="$few" "${short[@]}"
step profile 60 python bench.py profile --ways=compiled --sizes="$small" --strategies=unified
step kernels_large 60 python bench.py kernels --sizes="$large" --tuned="$out/tune.json" "${short[@]}"

[[ -z $failed ]] || { echo "== not done:$failed" >&2; exit 1; }
