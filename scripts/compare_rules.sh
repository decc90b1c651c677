#!/usr/bin/env bash
# Compare all rules of token reduction on one trained Vim: the same budgets, the same test images, fused and pruned.
# Top-1 has paired intervals over images. Nothing is trained.
#
# Usage: scripts/compare_rules.sh WEIGHTS FOLDER [options of famba evaluate ...]
#   scripts/compare_rules.sh vim_micro_patch4_32 rules --data-root data/cifar100
#   BUDGETS=28,56,96,132,168 scripts/compare_rules.sh runs/mine rules     # 224 x 224 pixels, patches of 16
#
# Every rule reduces after the scan, in every layer, so that all of them can see what the scans did. The budgets have to
# be such that a grid can lose them in whole rows and columns; others are refused with the nearest.
set -euo pipefail
weights=$1 folder=$2
here=$(dirname "$0")
python=${PYTHON:-python}
"$python" -m famba evaluate "$weights" --fusion all --budget "${BUDGETS:-8,16,32,48,55}" --place after_scan \
    --rule bipartite,r_meeto,neighbours,grid,delta,output --mode fuse,prune --out "$folder" "${@:3}"
"$python" "$here/rule_curves.py" "$folder/evaluate.csv" "$folder/rules.png"
