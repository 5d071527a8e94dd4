#!/bin/sh
# Token level, everything against everything: the adapters of run.sh (same OUT and SEEDS), AutoDeco's heads, TURN, EDT, dynamic
# temperature, min-p and top-nσ, judged together on the same test problems.
# usage: [SEEDS="0 1 2"] [VARIANTS="..."] recipes/table5/rivals.sh OUT CONFIG.toml AUTODECO.toml [OPTION ...]
# Options are for judging. An interrupted run continues.
set -eu
out=$1 config=$2 heads=$3
shift 3
adapters=""
for seed in ${SEEDS:-0 1 2}; do
    [ -e "$out/autodeco-$seed/adapter/adapter.json" ] || rheostat train autodeco --config "$heads" --seed "$seed" --out "$out/autodeco-$seed"
    adapters="$adapters $out/autodeco-$seed/adapter"
    for variant in ${VARIANTS:-with-budget without-budget entropy-only}; do
        adapters="$out/$variant-$seed/adapter $adapters"
    done
done
rheostat evaluate --config "$config" --out "$out/rivals" --baselines turn edt dynamic --strategies table14 T=1,m=0.1 T=1,s=1 "$@" \
    --adapter $adapters
