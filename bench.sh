#!/usr/bin/env bash
# Measure everything on this machine, after the tests that only a GPU can run: a wrong kernel needs no timing.
# Flags go to every verb of bench.py: bash bench.sh --sizes=llama_0.12b
cd "$(dirname "$0")" || exit
python -m pytest -q -rs tests/test_gpu.py || exit
failed=0
for verb in kernels overhead peers profile; do
  echo "== bench.py $verb"
  python bench.py "$verb" "$@" || failed=1  # what fails loses no other's table
done
exit $failed
