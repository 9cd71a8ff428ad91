#!/usr/bin/env bash
# Measures what a GPU can show, in order of worth, for at most --minutes (15), and stops by itself:
#
#     bash bench.sh --minutes=12 --out=results/bench
#
#     gpu_tests                    are the results right on this GPU?
#     tune                         which constants make the kernels fastest? bench.py then uses them.
#     overhead                     what does each strategy add to a step's time and memory?
#     profile_unified, _baseline   where does the time of a step go?
#     peers                        is a step as fast as Hugging Face's Llama and nanoGPT (--nanogpt=PATH, a clone)?
#     kernels                      how fast is each kernel, next to a copy and to torch.compile?
#     step_baseline, _unified      would CUDA graphs, say, make a step faster?
#     overhead_large, _moe         what do the strategies add at 1B, and in a mixture of experts?
#     kernels_large                how fast are the kernels at the widths of 1B?
#
# Each step has a time limit and writes its tables as it goes; if it fails, the others still run. Started again with the
# same --out, the script does the steps that are not done yet. --tiny runs all of them at sizes for a CPU: try that
# first, since a GPU is expensive.
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

step() {  # step NAME SECONDS what python is given…
  local name=$1 limit=$2 left=$((end - SECONDS))
  shift 2
  if grep -qsx "$name" "$out/steps_done"; then echo "== $name: done before"; return; fi
  if ((left < limit)); then limit=$left; fi
  if ((limit < 20)); then echo "== $name: no time left"; return; fi
  echo "== $name, at most $limit s"
  # our scripts know how long they may take, and stop by themselves; timeout stops the rest
  local budget=()
  [[ $1 == *.py ]] && budget=(--seconds=$((limit * 8 / 10)) --out="$out")
  if timeout --kill-after=5 "$limit" python "$@" "${budget[@]}"; then
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
  small=llama_0.12b large=llama_1b mixture=moe_0.5b short=() tune=(--widths=768)
fi
few="baseline,unified,unified --head_placement=input"

# An arm takes 10 to 20 s to build, most of it in torch.compile; overhead has nine. A constant takes 1.2 s to compile.
step gpu_tests 240 -m pytest -o addopts= -q -x -rs tests/test_gpu.py
step tune 120 results/tune.py "${tune[@]}"
tuned=() && [[ -f $out/tune.json ]] && tuned=(--tuned="$out/tune.json")
step overhead 220 bench.py overhead --ways=compiled --size="$small" "${tuned[@]}" "${short[@]}"
for strategy in unified baseline; do
  step profile_$strategy 45 bench.py profile --ways=compiled --size="$small" --strategies=$strategy "${tuned[@]}"
done
step peers 90 bench.py peers --ways=compiled --size="$small" "${tuned[@]}" "${short[@]}" "${peers[@]}"
step kernels 50 bench.py kernels --size="$small" "${tuned[@]}" "${short[@]}"
for strategy in baseline unified; do
  step step_$strategy 70 results/step.py --size="$small" --strategy=$strategy "${short[@]}"
done
step overhead_large 100 bench.py overhead --ways=compiled --size="$large" --strategies="$few" "${tuned[@]}" "${short[@]}"
step overhead_moe 100 bench.py overhead --ways=compiled --size="$mixture" --strategies="$few" "${tuned[@]}" "${short[@]}"
step kernels_large 50 bench.py kernels --size="$large" "${tuned[@]}" "${short[@]}"

[[ -z $failed ]] || { echo "== not done:$failed" >&2; exit 1; }
