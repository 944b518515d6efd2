#!/usr/bin/env bash
# The command lines of the reference page, word for word: only model path, tokenizer path and devices are variables.
# The ports are the page's. Ends with a completion and a chat stream through registry, master, prefill and decode.
#
#   MODEL=models/xllm-demo P_DEVICE=cpu:0 D_DEVICE=cpu:0 tests/smoke/reference_page.sh
#   XLLM_SIMULATE_NPU=2 P_DEVICE=npu:0 D_DEVICE=npu:1 tests/smoke/reference_page.sh     the page's own devices, simulated (docs/devices.md)
#   PASTED=1 tests/smoke/reference_page.sh     with the page's D command as it stands there, stray blanks included
set -euo pipefail
cd "$(dirname "$0")/../.."

MODEL=${MODEL:-$PWD/models/xllm-demo}
TOKENIZER=${TOKENIZER:-$MODEL}
P_DEVICE=${P_DEVICE:-cpu:0}
D_DEVICE=${D_DEVICE:-cpu:0}
logs=$(mktemp -d)
pids=()

finish() {
    status=$?
    for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    if [ $status -ne 0 ]; then tail -n 30 "$logs"/*.log; fi
    rm -rf "$logs"
    exit $status
}
trap finish EXIT

await() { # await SECONDS WHAT COMMAND...
    local left=$(($1 * 10)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        left=$((left - 1))
        if [ $left -le 0 ]; then echo "waited too long for $what" >&2; return 1; fi
        sleep 0.1
    done
}

cd bin
env -u ETCD_DATA_DIR ./etcd >"$logs/etcd.log" 2>&1 &
pids+=($!)

ENABLE_DECODE_RESPONSE_TO_SERVICE=true ./xllm_master_serving --etcd_addr="127.0.0.1:12389" --http_server_port 28888 --rpc_server_port 28889 --tokenizer_path="$TOKENIZER/" >"$logs/master.log" 2>&1 &
pids+=($!)

./xllm --model="$MODEL" \
       --port=8010 \
       --devices="$P_DEVICE" \
       --master_node_addr="127.0.0.1:18888" \
       --enable_prefix_cache=false \
       --enable_chunked_prefill=false \
       --enable_disagg_pd=true \
       --instance_role=PREFILL \
       --etcd_addr="127.0.0.1:12389" \
       --transfer_listen_port=26000 \
       --disagg_pd_port=7777 \
       --node_rank=0 \
       --nnodes=1 >"$logs/prefill.log" 2>&1 &
pids+=($!)

if [ -n "${PASTED:-}" ]; then # the page's D command ends early, at the blanks behind a backslash: D takes other ports
    await 90 "/ready of the prefill instance" curl -sf http://127.0.0.1:8010/ready
    ./xllm --model="$MODEL" \
       --port=8020 \
       --devices="$D_DEVICE" \
       --master_node_addr="127.0.0.1:18898" \
       --enable_prefix_cache=false \
       --enable_chunked_prefill=false \
       --enable_disagg_pd=true \
       --instance_role=DECODE \
       --etcd_addr="127.0.0.1:12389" \  >"$logs/decode.log" 2>&1 &
else
./xllm --model="$MODEL" \
       --port=8020 \
       --devices="$D_DEVICE" \
       --master_node_addr="127.0.0.1:18898" \
       --enable_prefix_cache=false \
       --enable_chunked_prefill=false \
       --enable_disagg_pd=true \
       --instance_role=DECODE \
       --etcd_addr="127.0.0.1:12389" \
       --transfer_listen_port=26100 \
       --disagg_pd_port=7787 \
       --node_rank=0 \
       --nnodes=1 >"$logs/decode.log" 2>&1 &
fi
pids+=($!)

# on a slow machine a lone P serves alone (mode degraded) until D has loaded
pair_is_ready() { curl -sf http://127.0.0.1:28888/ready | grep -q '"mode":"pd"'; }
await 90 "a linked pair at the master" pair_is_ready

name=$(basename "$MODEL")
completion=$(curl -sS --max-time 60 http://127.0.0.1:28888/v1/completions \
    -H 'Content-Type: application/json' \
    -d "{\"model\":\"$name\",\"prompt\":\"What is prefill?\",\"max_tokens\":16,\"temperature\":0,\"ignore_eos\":true}")
python3 - "$completion" <<'PY'
import json, sys
answer = json.loads(sys.argv[1])
assert answer["object"] == "text_completion", answer
assert answer["usage"]["completion_tokens"] == 16, answer
assert answer["choices"][0]["finish_reason"] == "length", answer
PY

stream=$(curl -sSN --max-time 60 http://127.0.0.1:28888/v1/chat/completions \
    -H 'Content-Type: application/json' \
    -d "{\"model\":\"$name\",\"stream\":true,\"stream_options\":{\"include_usage\":true},\"temperature\":0,\"max_tokens\":64,\"messages\":[{\"role\":\"user\",\"content\":\"What is prefill?\"}]}")
python3 - "$stream" <<'PY'
import json, sys
lines = [line[6:] for line in sys.argv[1].splitlines() if line.startswith("data: ")]
assert lines[-1] == "[DONE]", lines
chunks = [json.loads(line) for line in lines[:-1]]
text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
assert text.strip(), chunks
assert chunks[-1]["usage"]["completion_tokens"] >= 1, chunks[-1]
print("chat:", text.strip())
PY

for port in 8010 8020; do # both instances answer plain requests on their own port too
    curl -sSf --max-time 60 "http://127.0.0.1:$port/v1/completions" -H 'Content-Type: application/json' \
        -d "{\"model\":\"$name\",\"prompt\":\"Hello\",\"max_tokens\":4}" >/dev/null
done
echo "reference page: ok"
