#!/usr/bin/env bash
# The story in one go: a plan that is refused, what would fit, a tuning run inside the budget, its receipt, a chat.
# `make demo` runs it with the environment that it has set up.
set -euo pipefail
cd "$(dirname "$0")/.."

MEMORY=${MEMORY:-1100MiB}

say() { printf '\n# %s\n' "$*"; }
run() { printf '$ %s\n' "$1"; eval "$1"; }

say "Tune all weights of a 135M-parameter model in $MEMORY, by AdamW? The plan rehearses the job without its memory."
run "satchel plan tune --config examples/full.toml --memory $MEMORY" || [ $? -eq 2 ]

say "It says what would fit: an adapter. Tune it inside the budget; the receipt sets prediction beside measurement."
rm -rf runs/demo
run "satchel tune --config examples/demo.toml --memory $MEMORY"

say "The adapter lies in runs/demo/adapter, as PEFT writes them. Ask the tuned model something."
run 'satchel chat demo --adapter runs/demo/adapter --prompt "What does the yield statement do in Python?" --max-tokens 60 --temperature 0'
