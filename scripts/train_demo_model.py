"""Trains the demo model from `demo_corpus.md` and writes the checkpoint that the quickstart serves.

Seeded, on the CPU, within the time limit it is given. Needs the test extra (transformers is the reference implementation here; the
server itself never imports it):
    .venv/bin/python scripts/train_demo_model.py --out models/xllm-demo
    .venv/bin/python scripts/train_demo_model.py --check models/xllm-demo      # only asks, trains nothing
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.normalizers import NFC
from transformers import Qwen2Config, Qwen2ForCausalLM

CORPUS = Path(__file__).with_name("demo_corpus.md")
VOCABULARY = 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTEXT_TOKENS = 2048
POOLED_BATCHES = 16
DEFAULT_SYSTEM = "You are the demo model of xllm_py."
OTHER_SYSTEMS = ("You are a helpful assistant.", "Answer briefly.", "You are a helpful AI.")
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHAPE = {  # about 3.5 million parameters, 6.7 MiB in bfloat16
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": CONTEXT_TOKENS,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
OPENERS = (
    "Please tell me: ",
    "Can you tell me: ",
    "One question: ",
    "I wonder, ",
    "So, ",
    "Hi! ",
    "Hello, ",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """One answer, the questions it is trained on and those it is only tested on."""

    name: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str


def read_corpus(path: Path) -> list[Topic]:
    """The topics of the corpus file; ValueError naming the topic that lacks an answer or a question."""
    topics = []
    for part in path.read_text().split("\n## ")[1:]:
        name, *lines = part.splitlines()
        marked = {
            mark: [line[2:].strip() for line in lines if line.startswith(mark)]
            for mark in ("- ", "? ", "> ")
        }
        if not marked["- "] or not marked["> "]:
            raise ValueError(f"topic {name} has no question or no answer")
        topics.append(
            Topic(
                name=name,
                questions=tuple(marked["- "]),
                held_out=tuple(marked["? "]),
                answer=" ".join(marked["> "]),
            )
        )
    return topics


def train_tokenizer(topics: list[Topic]) -> Tokenizer:
    """Byte-level BPE in the layout of Qwen2's tokenizer.json, trained on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for topic in topics for text in (*topic.questions, *[topic.answer] * 4)]
    chrome = [DEFAULT_SYSTEM, *OTHER_SYSTEMS, *OPENERS, "system\n", "user\n", "assistant\n"] * 8
    tokenizer.train_from_iterator([*texts, *chrome], trainer)
    missing = VOCABULARY - len(SPECIAL) - tokenizer.get_vocab_size()
    if missing:
        raise ValueError(
            f"the corpus is too small for this vocabulary: {missing} pieces are missing"
        )
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL]
    )
    return tokenizer


def reword(question: str, rng: random.Random) -> str:
    """The same question as people type it: other case, no question mark, an opener, a slip of the finger."""
    if rng.random() < 0.15:
        opener = rng.choice(OPENERS)
        question = opener + question[0].lower() + question[1:]
    if rng.random() < 0.2:
        question = question.rstrip("?.!")
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.07 and len(question) > 12:
        place = rng.randrange(4, len(question) - 1)
        question = question[:place] + question[place + 1 :]
    if rng.random() < 0.05:
        question += rng.choice((" please", " Please.", "?", " thanks"))
    return question


def encode_turns(
    turns: list[tuple[str, str]], system: str, tokenizer: Tokenizer
) -> tuple[list[int], list[float]]:
    """ChatML ids and the weight of each as a target: answers count, the rest hardly."""
    ids: list[int] = []
    weights: list[float] = []

    def add(text: str, weight: float) -> None:
        new = tokenizer.encode(text, add_special_tokens=False).ids
        ids.extend(new)
        weights.extend([weight] * len(new))

    add(f"<|im_start|>system\n{system}<|im_end|>\n", 0.0)
    for question, answer in turns:
        add(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", 0.02)
        add(f"{answer}<|im_end|>", 1.0)
        add("\n", 0.0)
    return ids, weights


def sample(
    topics: list[Topic], tokenizer: Tokenizer, rng: random.Random
) -> tuple[list[int], list[float]]:
    """One training sequence: mostly one question, sometimes a conversation, sometimes plain text."""
    topic = rng.choice(topics)
    if rng.random() < 0.1:  # for /v1/completions, which sees no template
        text = rng.choice((f"{rng.choice(topic.questions)} {topic.answer}", topic.answer))
        ids = tokenizer.encode(f"{text}<|endoftext|>", add_special_tokens=False).ids
        return ids, [0.3] * len(ids)
    chosen = [topic]
    if rng.random() < 0.1:
        chosen.append(rng.choice(topics))
    turns = [(reword(rng.choice(each.questions), rng), each.answer) for each in chosen]
    system = DEFAULT_SYSTEM if rng.random() < 0.85 else rng.choice(OTHER_SYSTEMS)
    return encode_turns(turns, system, tokenizer)


def batches(
    size: int, topics: list[Topic], tokenizer: Tokenizer, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """ids and target weights for ever, both [rows, length]; rows of like length share a batch, so little is padding."""
    while True:
        pool = sorted(
            (sample(topics, tokenizer, rng) for _ in range(size * POOLED_BATCHES)),
            key=lambda row: len(row[0]),
        )
        starts = list(range(0, len(pool), size))
        rng.shuffle(starts)
        for start in starts:
            yield padded(pool[start : start + size])


def padded(rows: list[tuple[list[int], list[float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as two tensors [rows, length], padded on the right with a weight of 0."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), VOCABULARY - len(SPECIAL))
    weights = torch.zeros(len(rows), longest)
    for row, (row_ids, row_weights) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        weights[row, : len(row_weights)] = torch.tensor(row_weights)
    return ids, weights


def train(
    model: Qwen2ForCausalLM,
    topics: list[Topic],
    tokenizer: Tokenizer,
    arguments: argparse.Namespace,
) -> None:
    """AdamW with warm-up and a cosine, for `--steps` steps or until `--minutes` are over."""
    source = batches(arguments.batch, topics, tokenizer, random.Random(arguments.seed))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.98))
    started = time.monotonic()
    model.train()
    for step in range(arguments.steps):
        spent = (time.monotonic() - started) / 60
        if spent > arguments.minutes:
            print(f"time is up after {step} steps: the result depends on the machine's speed")
            break
        progress = step / arguments.steps
        rate = (
            arguments.rate
            * min(1.0, (step + 1) / 50)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, weights = next(source)
        logits = model(input_ids=ids[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(
            logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1), reduction="none"
        )
        targets = weights[:, 1:].reshape(-1)
        loss = (losses * targets).sum() / targets.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == arguments.steps - 1:
            print(
                f"step {step} loss {loss.item():.4f} tokens {ids.numel()} minutes {spent:.1f}",
                flush=True,
            )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Indented, with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save(model: Qwen2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """The checkpoint as Hugging Face lays it out; the JSON files are written by hand so that no version slips in."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    end, text_end = (tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>"))
    write_json(folder / "config.json", SHAPE | {"bos_token_id": text_end, "eos_token_id": end})
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": text_end,
            "do_sample": False,
            "eos_token_id": [end, text_end],
            "pad_token_id": text_end,
        },
    )
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer))


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """As Qwen2 writes it."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(tokenizer.token_to_id(name)): {"content": name, **flags, "special": True}
        for name in SPECIAL
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": CONTEXT_TOKENS,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


@torch.inference_mode()
def ask(model: Qwen2ForCausalLM, tokenizer: Tokenizer, question: str) -> str:
    """The greedy answer to one question."""
    prompt = f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    made = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=120,
        do_sample=False,
    )
    return str(tokenizer.decode(made[0, len(ids) :].tolist(), skip_special_tokens=True))


def check(folder: Path, topics: list[Topic]) -> int:
    """Asks trained and held-out questions; 1 when fewer than 95 % and 60 % get their topic's answer."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    answers = {topic.answer: topic.name for topic in topics}
    trained = [(topic, topic.questions[-1]) for topic in topics]
    unseen = [(topic, question) for topic in topics for question in topic.held_out]
    shares = []
    for kind, asked in (("trained", trained), ("held-out", unseen)):
        right = 0
        for topic, question in asked:
            answer = ask(model, tokenizer, question)
            right += answer == topic.answer
            if answer != topic.answer:
                where = answers.get(answer)
                print(
                    f"{kind}: {question} ({topic.name}) -> {f'the answer of {where}' if where else answer}"
                )
        shares.append(right / len(asked))
        print(f"{kind}: {right} of {len(asked)} get their topic's answer, word for word")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{folder}: {size / 2**20:.2f} MiB, {sum(p.numel() for p in model.parameters())} parameters"
    )
    return 0 if shares[0] >= 0.95 and shares[1] >= 0.6 and size <= 8 * 2**20 else 1


def main() -> int:
    """Train, write, ask."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models/xllm-demo"))
    parser.add_argument("--check", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    topics = read_corpus(CORPUS)
    if arguments.check:
        return check(arguments.check, topics)
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(topics)
    model = Qwen2ForCausalLM(Qwen2Config.from_dict(SHAPE))
    train(model, topics, tokenizer, arguments)
    save(model, tokenizer, arguments.out)
    return check(arguments.out, topics)


if __name__ == "__main__":
    sys.exit(main())
