#!/usr/bin/env bash
# The experiments that need a GPU, each one command that can be repeated until it is done:
#
#     bash results/lease.sh small --minutes=14   # 0.86M parameters: primary, then figure5 and head by the paper's protocol
#     bash results/lease.sh lab --minutes=9      # the suites that have not run at the lab size, by the same protocol
#     bash results/lease.sh large --minutes=9    # 10M parameters, all Python source of the machine, one epoch at most
#
# 16 cells run at a time and share the GPU by NVIDIA's MPS, each with CUDA graphs, in fp32 with TF32 products. On an H200
# 60 cells of 0.86M parameters took 8 minutes, so the 60 cells of figure5 take as long. Run tests/test_gpu.py first: it
# would have shown that torch 2.11 compiled a wrong gradient, to which 32 cells were lost. When the time is over, finished
# cells are in results/SUITE_0.86M or results/large; commit them, and the same command continues from there, with the same
# commit of this code. --out=FOLDER puts those folders elsewhere (first copy there what results/ has of them). --tiny
# tries it all on a CPU.
set -u
cd "$(dirname "$0")/.." || exit
what=${1:-} minutes=8 out=results jobs=16 tiny=()
for flag in "${@:2}"; do
  case $flag in
    --minutes=*) minutes=${flag#*=} ;;
    --out=*) out=${flag#*=} ;;
    --tiny) jobs=2 tiny=(--n_layer=1 --n_head=2 --n_embd=16 --block_size=32 --batch_tokens=64 --max_steps=4 --warmup_steps=1
                         --eval_tokens=64 --eval_interval=4 --compile=False --lrs=8e-3 --seeds=11) ;;
    *) echo "lease.sh: unknown flag $flag; there are --minutes=, --out= and --tiny" >&2; exit 2 ;;
  esac
done
end=$((SECONDS + $(python -c "print(int(60 * $minutes))"))) failed=0
export TORCHINDUCTOR_CUDAGRAPHS=1 TORCHINDUCTOR_COMPILE_THREADS=1 TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1
if command -v nvidia-cuda-mps-control > /dev/null; then
  export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps
  mkdir -p /tmp/mps && nvidia-cuda-mps-control -d
  trap 'echo quit | nvidia-cuda-mps-control' EXIT
fi

suite() {  # suite FOLDER ARGUMENTS OF ablate.py…: until it is done or the time is over
  timeout --kill-after=20 $((end - SECONDS > 20 ? end - SECONDS - 15 : 5)) \
    python ablate.py "${@:2}" --out="$out/$1" --jobs=$jobs || failed=$?
}

case $what in
  small)
    # 4 layers of width 128, 852,608 parameters, 20 tokens per parameter; all else is the lab size's. The rate is the one
    # that primary_0.86M's tuning chose for the baseline; figure5's chose 8e-3 on the same seeds, the edge of what trains.
    # The primary ran when unified's v had a magnitude, so it runs anew.
    shape=(config/size/lab.py --n_layer=4 --n_head=4 --n_embd=128 --max_steps=8326 --eval_interval=4163
           --dtype=float32 --compile=True)
    suite primary_0.86M primary "${shape[@]}" --lrs=2e-3,4e-3,8e-3,16e-3 --seeds=11,12,13,14,15,16,17,18 "${tiny[@]}"
    for name in figure5 head; do
      suite ${name}_0.86M $name "${shape[@]}" --lrs=4e-3 --seeds=11,12,13,14,15 "${tiny[@]}"
    done ;;
  lab)
    shape=(config/size/lab.py --dtype=float32 --compile=True --lrs=2e-3,4e-3,8e-3,16e-3,32e-3 --tune=reference)
    names=(start figure3)
    [[ ${tiny[*]} ]] || names+=(figure7)  # it has sizes of its own
    for name in "${names[@]}"; do
      suite "$name" "$name" "${shape[@]}" --seeds=11,12,13,14,15 "${tiny[@]}"
    done ;;
  large)
    # 12 layers of width 256. The rate of each arm is its best one at 0.86M times 128/256, the ratio of the widths; light
    # takes unified's. 20 tokens per parameter, or one epoch if the corpus has fewer.
    [[ ${tiny[*]} ]] || python data/pysrc/prepare.py --site_packages || exit
    data=$([[ ${tiny[*]} ]] && echo pysrc || echo pysrc_site)
    mkdir -p "$out/large"
    for arm in baseline unified unified_light; do
      rate=$(python - "$out/primary_0.86M/results.csv" "${arm%_light}" << 'PYTHON'
import sys
from stats import read_csv
rates = {float(row["lr"]) for row in read_csv(sys.argv[1]) if row["arm"] == sys.argv[2] and row["use"] == "report"}
print(*(rate * 128 / 256 for rate in rates))
PYTHON
      )
      [[ $rate ]] || { echo "lease.sh: $out/primary_0.86M has no rate for $arm: run small first" >&2; exit 1; }
      { cat "config/$arm.py"; echo "lr = $rate"; } > "$out/large/$arm.py"
    done
    steps=$(python -c "from data.tokens import Tokens, data_folder
print(min(20 * 9_568_512, Tokens(data_folder('$data'), 'train', 512, 256).n_tokens) // 16384)") || exit
    suite large "$out/large/baseline.py,$out/large/unified.py,$out/large/unified_light.py" --dataset="$data" \
      --n_layer=12 --n_head=4 --n_embd=256 --vocab_size=256 --block_size=512 --batch_tokens=16384 --micro_batch=32 \
      --max_steps="$steps" --warmup_steps=200 --eval_interval=$((steps / 4 + 1)) --eval_tokens=4194304 \
      --save_interval=1000000 --compile=True --seeds=11,12,13 "${tiny[@]}" ;;
  *) echo "lease.sh: say small, lab or large" >&2; exit 2 ;;
esac
exit $failed
