#!/bin/sh
# The token-level results of docs/results.md: variants and seeds, judged together on the same test problems.
# usage: recipes/token_level.sh OUT [SEED ...]     (an interrupted run continues)
set -eu
out=$1
shift
seeds=${*:-0 1 2}
variants="pass@k pass@1 pass@k-entropy-only pass@k-without-budget"
problems="--problems.train 800 --problems.validation 96 --problems.test 200"
settings="--budgets 1 8 --filter-samples 8 --prompts 16 --group 16 --steps 40 --validate-every 20 --validation-samples 8"
adapters=""
for seed in $seeds; do
    for variant in $variants; do
        case $variant in
            pass@k) more="--objective pass@k" ;;
            pass@1) more="--objective pass@1" ;;
            pass@k-entropy-only) more="--objective pass@k --features entropy" ;;
            pass@k-without-budget) more="--objective pass@k --no-with-budget" ;;
        esac
        run="$out/$variant-$seed"
        if [ ! -e "$run/adapter/adapter.json" ]; then
            # the initial pass rates of the training prompts are those of the uniform policy, the same for every variant
            [ -d "$run/rollouts" ] || { mkdir -p "$run" && cp -r "$out/pass@k-$seed/rollouts" "$run/" 2>/dev/null || true; }
            rheostat train token $problems $settings $more --seed "$seed" --out "$run"
        fi
        adapters="$adapters $run/adapter"
    done
done
rheostat evaluate $problems --test-from 200 --adapter $adapters --out "$out/judged"
