"""Ours beside transformers, llama.cpp and vLLM, on the same weights, in turns: prefill of 512 and 2,048 tokens, decode at batch 1, 8 and 32.

    python -m benchmarks.peers [--shape 0.5b 5m] [--threads 2] [--rounds 5] [--who ours ours-w8a8 transformers llama.cpp vllm]

Engines alone, without HTTP. Who is not installed is left out and named: `pip install transformers`, `pip install llama-cpp-python gguf`, a CPU
build of vLLM. Weights are random bfloat16 (seeded), the same file for everybody; llama.cpp gets them as GGUF, bfloat16 too. Decode: one
token of each sequence behind 512. One JSON line per question: tokens/s of each (median, least, greatest), and ours over the best peer.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.models import config_of, tensor_shapes, write_model, write_weights
from benchmarks.offline import open_engine, start, step
from benchmarks.report import emit, summary

CONTEXT = 512
PROMPTS = (512, 2048)
BATCHES = (1, 8, 32)
_STEPS = 32  # decode steps that are timed together


class Peer(Protocol):
    """Something that computes a model."""

    def prefill(self, tokens: int) -> float:
        """Seconds from a prompt to its first token."""
        ...

    def decode(self, batch: int) -> float:
        """Seconds of one step of so many sequences behind CONTEXT tokens."""
        ...


class Ours:
    """The executor of one instance, scheduler and API left out."""

    def __init__(self, folder: Path, threads: int, quantization: str = "") -> None:
        self._engine = open_engine(folder, threads, quantization)
        self._ready = 0  # sequences whose context is there

    def prefill(self, tokens: int) -> float:
        """See Peer."""
        self._ready = 0
        return step(self._engine, [0], [tokens], [0], (start(0, tokens + 1),))

    def decode(self, batch: int) -> float:
        """See Peer."""
        rows = list(range(batch))
        if self._ready != batch:
            starts = tuple(start(row, CONTEXT + _STEPS + 1) for row in rows)
            step(self._engine, rows, [1] * batch, [CONTEXT] * batch, starts)
            self._ready = batch
        seconds = [
            step(self._engine, rows, [1] * batch, [CONTEXT + number] * batch, ())
            for number in range(_STEPS)
        ]
        return statistics.mean(seconds)


class Transformers:
    """Hugging Face's own, eager, SDPA."""

    def __init__(self, folder: Path, threads: int) -> None:
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._vocabulary = self._model.config.vocab_size
        self._cache: Any = None
        self._ready = 0  # sequences whose context is in the cache

    def _ids(self, batch: int, tokens: int) -> torch.Tensor:
        ids = torch.arange(batch * tokens).view(batch, tokens) * 7919 % self._vocabulary
        return ids.contiguous()

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        """See Peer."""
        ids = self._ids(1, tokens)
        began = time.perf_counter()
        self._model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return time.perf_counter() - began

    @torch.inference_mode()
    def decode(self, batch: int) -> float:
        """See Peer."""
        if self._ready != batch:
            told = self._model(self._ids(batch, CONTEXT), use_cache=True, logits_to_keep=1)
            self._cache, self._ready = told.past_key_values, batch
        cache, token = self._cache, self._ids(batch, 1)
        if cache.get_seq_length() > CONTEXT:
            cache.crop(CONTEXT - cache.get_seq_length())  # so many are taken away
        self._model(token, past_key_values=cache, use_cache=True)
        began = time.perf_counter()
        for _ in range(_STEPS):
            logits = self._model(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
        return (time.perf_counter() - began) / _STEPS


class LlamaCpp:
    """llama.cpp through its C interface, with batches of its own."""

    def __init__(self, folder: Path, threads: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        path = folder / "model.gguf"
        if not path.exists():
            write_gguf(folder, path)
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        model = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        self._threads = threads
        self._sequences, self._context = 0, None
        self._ready = 0  # sequences whose context is there
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)

    def _open(self, sequences: int, tokens: int) -> None:
        """A context for so many sequences; one at a time."""
        if self._sequences == sequences:
            return
        self._ready = 0
        if self._context:
            self._lib.llama_free(self._context)
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = sequences * tokens
        settings.n_batch = settings.n_ubatch = 512
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = self._threads
        self._context = self._lib.llama_init_from_model(self._model, settings)
        self._sequences = sequences
        if not self._context:
            raise SystemExit("llama.cpp could not open the model")

    def _run(self, entries: Sequence[tuple[int, int, bool]]) -> None:
        """(sequence, position, whether logits are wanted) of each token; at most 512."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (sequence, position, wanted) in enumerate(entries):
            batch.token[index] = (position * 31 + sequence * 7) % 1000
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        if self._lib.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp refused a batch")
        self._lib.llama_get_logits_ith(self._context, -1)

    def _prompt(self, sequence: int, tokens: int) -> None:
        for first in range(0, tokens, 512):
            last = min(first + 512, tokens)
            self._run([(sequence, at, at == tokens - 1) for at in range(first, last)])

    def prefill(self, tokens: int) -> float:
        """See Peer."""
        self._open(1, 4096)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._ready = 0
        began = time.perf_counter()
        self._prompt(0, tokens)
        return time.perf_counter() - began

    def decode(self, batch: int) -> float:
        """See Peer."""
        self._open(batch, 4096 if batch == 1 else 1024)
        memory = self._lib.llama_get_memory(self._context)
        if self._ready != batch:
            self._lib.llama_memory_clear(memory, True)
            for sequence in range(batch):
                self._prompt(sequence, CONTEXT)
            self._ready = batch
        for sequence in range(batch):
            self._lib.llama_memory_seq_rm(memory, sequence, CONTEXT, -1)
        self._run([(sequence, CONTEXT, True) for sequence in range(batch)])
        began = time.perf_counter()
        for number in range(1, _STEPS + 1):
            self._run([(sequence, CONTEXT + number, True) for sequence in range(batch)])
        return (time.perf_counter() - began) / _STEPS


class Vllm:
    """vLLM's CPU back end through its LLM class; one token is what a prompt costs, the rest is decode."""

    def __init__(self, folder: Path, threads: int) -> None:
        import vllm

        self._lib = vllm
        self._llm = vllm.LLM(
            model=str(folder),
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=4096,
            max_num_batched_tokens=4096,
        )

    def _seconds(self, batch: int, tokens: int, answer: int) -> float:
        prompts = [
            {"prompt_token_ids": [(7919 * i + 31 * row) % 1000 for i in range(tokens)]}
            for row in range(batch)
        ]
        wanted = self._lib.SamplingParams(
            temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        self._llm.generate(prompts, wanted, use_tqdm=False)
        return time.perf_counter() - began

    def prefill(self, tokens: int) -> float:
        """See Peer."""
        return self._seconds(1, tokens, 1)

    def decode(self, batch: int) -> float:
        """See Peer."""
        once, steps = self._seconds(batch, CONTEXT, 1), 4 * _STEPS
        return (self._seconds(batch, CONTEXT, 1 + steps) - once) / steps


def write_gguf(folder: Path, path: Path) -> None:
    """The safetensors file as GGUF, matrices bfloat16, vectors float32 as llama.cpp wants them."""
    import gguf
    from safetensors import safe_open

    shape = next(name for name in ("0.5b", "5m", "tiny") if folder.name == name)
    config = config_of(shape)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in tensor_shapes(shape):
            tensor = file.get_tensor(name)
            there = gguf_name(name)
            if tensor.ndim == 1:
                writer.add_tensor(there, tensor.float().numpy())
            else:
                raw = tensor.contiguous().view(torch.uint8).numpy()
                writer.add_tensor(there, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_GGUF = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, *_, part, kind = name.split(".")
    return f"blk.{layer}.{_GGUF[part]}.{kind}"


WHO: dict[str, Callable[[Path, int], Peer]] = {
    "ours": Ours,
    "ours-w8a8": lambda folder, threads: Ours(folder, threads, "w8a8"),
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "vllm": Vllm,
}


def open_peers(who: Sequence[str], folder: Path, threads: int) -> dict[str, Peer]:
    """Those that are installed; the others are named."""
    found: dict[str, Peer] = {}
    for name in who:
        try:
            found[name] = WHO[name](folder, threads)
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
    return found


def measure(peers: dict[str, Peer], rounds: int, settings: dict[str, Any]) -> None:
    """Every question to everybody, once unmeasured, then in turns."""
    questions: dict[str, tuple[int, Callable[[Peer], float]]] = {}
    for tokens in PROMPTS:
        questions[f"prefill {tokens}"] = (tokens, lambda peer, n=tokens: peer.prefill(n))  # type: ignore[misc]
    for batch in BATCHES:
        questions[f"decode batch {batch}"] = (batch, lambda peer, n=batch: peer.decode(n))  # type: ignore[misc]
    for what, (tokens, ask) in questions.items():
        speeds: dict[str, list[float]] = {name: [] for name in peers}
        for number in range(rounds + 1):
            for name, peer in peers.items():
                seconds = ask(peer)
                if number:
                    speeds[name].append(tokens / seconds)
        results: dict[str, Any] = {name: summary(each) for name, each in speeds.items()}
        others = [results[name]["median"] for name in results if not name.startswith("ours")]
        if others and "ours" in results:
            results["over_best_peer"] = round(results["ours"]["median"] / max(others), 2)
        emit(f"peers, {what}", settings, results)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=["0.5b", "5m"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--who", nargs="+", choices=sorted(WHO), default=list(WHO))
    parser.add_argument(
        "--keep", type=Path, help="a folder for the model files, kept for the next run"
    )
    options = parser.parse_args()
    # ours keeps torch's products from AMX, for their bits (decision 0020); the peers are to have it
    os.environ["ONEDNN_MAX_CPU_ISA"] = "ALL"
    with contextlib.ExitStack() as stack:
        place = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for shape in options.shape:
            folder = place / shape
            if not (folder / "model.safetensors").exists():
                write_model(folder, shape)
                write_weights(folder, shape)
            peers = open_peers(options.who, folder, options.threads)
            settings = {"shape": shape, "threads": options.threads, "dtype": "bfloat16"}
            measure(peers, options.rounds, settings)


if __name__ == "__main__":
    main()
