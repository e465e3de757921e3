"""Train `demo-llama` from scratch on Debian's package index: `make model` runs this file, then `evaluate`."""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from complete_fn_workers.demo_model.corpus import (
    INSTRUCTIONS,
    SECTION,
    WORD,
    Package,
    answer,
    join_binaries,
    read_index,
    split_of,
)
from complete_fn_workers.demo_model.tokenizer import END_OF_TURN, rendered, save_tokenizer, train_tokenizer
from complete_fn_workers.swiftkv.reference import Llama, LlamaShape

SHAPE = LlamaShape(
    vocab_size=5120,
    hidden_size=256,
    intermediate_size=480,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
BATCH_TOKENS = 16_384
LENGTHS = (64, 96, 128, 192, 256, 384, 512, 1024, 2048, 3072)  # few, because the model is compiled for each length
PROMPT_LOSS_SHARE = 0.15  # share of prompt tokens that also enter the loss, because the text teaches the language
COPY_FROM, COPY_SHARE = 0.2, 0.12  # after a fifth of the training, this share of the batches is copying exercises


class Examples:
    """An endless, shuffled stream of (tokens, start of the answer). Invented names teach the model to copy."""

    def __init__(self, packages: list[Package], tokenizer: Tokenizer, seed: int) -> None:
        self.random = random.Random(seed)
        self.short = packages
        self.long = join_binaries(packages)
        self.tokenizer = tokenizer
        uses = Counter(w for p in packages for w in set(WORD.findall(p.description)))
        self.rare = sorted(w for w, n in uses.items() if n <= 20)
        self.uses = uses
        self.copy_share = 0.0

    def renamed(self, text: str, synopsis: str) -> tuple[str, str]:
        """Replace each rare word that text and synopsis share by another rare word, the same one in both."""
        for word in {w for w in WORD.findall(synopsis) if self.uses[w] <= 60 and w in text}:
            new = self.random.choice(self.rare)
            if self.random.random() < 0.5:
                cut = self.random.randrange(2, 4)
                new = new[:cut] + self.random.choice(self.rare)[cut : cut + self.random.randrange(2, 7)]
            text, synopsis = text.replace(word, new), synopsis.replace(word, new)
        return text, synopsis

    def one(self, package: Package, instruction: str) -> tuple[list[int], int]:
        text, synopsis = package.description, package.synopsis
        if instruction != SECTION and self.random.random() < 0.6:
            text, synopsis = self.renamed(text, synopsis)
        prompt = self.tokenizer.encode(rendered(instruction + text), add_special_tokens=False).ids
        reply = self.tokenizer.encode(
            answer(instruction, package.section, synopsis) + END_OF_TURN, add_special_tokens=False
        ).ids
        return prompt + reply, len(prompt)

    def epoch(self) -> Iterator[tuple[list[int], int]]:
        order = [(p, i) for p in self.short for i in INSTRUCTIONS]
        order += [(p, i) for p in self.long for i in INSTRUCTIONS]
        self.random.shuffle(order)
        for package, instruction in order:
            yield self.one(package, instruction)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens, loss weights), each [rows, length]. Rows of similar length share a batch."""
        waiting: dict[int, list[tuple[list[int], int]]] = {n: [] for n in LENGTHS}
        while True:
            for example in self.epoch():
                length = next((n for n in LENGTHS if len(example[0]) <= n), None)
                if length is None:
                    continue
                rows = waiting[length]
                rows.append(example)
                if len(rows) * length >= BATCH_TOKENS:
                    yield self.padded(rows, length)
                    waiting[length] = []
                    if self.random.random() < self.copy_share:
                        yield self.copying()

    def copying(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of spans, repeated in another order: a text that begins like an earlier span continues like it.

        Half of the spans are words of the corpus, half are random tokens. Without these exercises the model learns to
        write names that are usual for such a package, and not the name in its prompt.
        """
        length, rows = 128, BATCH_TOKENS // 128
        tokens = torch.zeros(rows, length, dtype=torch.long)
        weights = torch.zeros(rows, length)
        for i in range(rows):
            spans = [self.span() for _ in range(self.random.randrange(4, 13))]
            ids, seen = [t for s in spans for t in s], sum(map(len, spans))
            while len(ids) < length:
                ids.extend(self.random.choice(spans))
            tokens[i] = torch.tensor(ids[:length])
            weights[i, min(seen, length - 1) :] = 1.0
        return tokens, weights

    def span(self) -> list[int]:
        if self.random.random() < 0.5:
            return [
                self.random.randrange(4, self.tokenizer.get_vocab_size()) for _ in range(self.random.randrange(2, 8))
            ]
        ids: list[int] = self.tokenizer.encode(" " + self.random.choice(self.rare), add_special_tokens=False).ids
        return ids

    def padded(self, rows: list[tuple[list[int], int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        weights = torch.zeros(len(rows), length)
        for i, (ids, start) in enumerate(rows):
            tokens[i, : len(ids)] = torch.tensor(ids)
            weights[i, 1:start] = (torch.rand(start - 1) < PROMPT_LOSS_SHARE).float()
            weights[i, start : len(ids)] = 1.0
        return tokens, weights


def loss_of(
    model: Callable[..., torch.Tensor], embedding: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the tokens with a weight. Only their rows pass the output layer."""
    hidden = model(tokens)[:, :-1]
    chosen = weights[:, 1:] > 0
    logits = F.linear(hidden[chosen], embedding.to(hidden.dtype))
    return F.cross_entropy(logits.float(), tokens[:, 1:][chosen])


def learning_rate(progress: float) -> float:
    """The factor of the learning rate: a warm-up over 1 % of the training, a linear fall to 0 in the last half."""
    return min(1.0, progress / 0.01) * min(1.0, (1.0 - progress) / 0.5)


def optimizers(model: Llama, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms (as in arXiv 2502.16982)."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("layers.")]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and n.startswith("layers."))]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def initialise(model: Llama) -> None:
    for name, p in model.named_parameters():
        if p.ndim == 2:
            scale = 0.02 if "o_proj" not in name and "down_proj" not in name else 0.02 / math.sqrt(16)
            torch.nn.init.normal_(p, std=scale)


def save(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face checkpoint in bfloat16: config, generation config, tokenizer, safetensors."""
    save_tokenizer(tokenizer, folder, SHAPE.max_position_embeddings)
    eos = tokenizer.token_to_id(END_OF_TURN)
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(SHAPE),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {f"model.{n}": p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def train(
    packages: list[Package],
    folder: Path,
    max_tokens: int,
    max_minutes: float,
    lr: float,
    seed: int,
    resume: tuple[Path, float] | None = None,
) -> None:
    """Train for `max_tokens` or `max_minutes`, whichever ends first, and write the checkpoint to `folder`.

    Args:
        resume: a checkpoint of an earlier training with the same arguments, and the share of it that was done.
    """
    start = resume[1] if resume else 0.0
    torch.manual_seed(seed + round(1000 * start))
    members = [p for p in packages if split_of(p.source) == "train"]
    model = Llama(SHAPE)
    if resume:
        tokenizer = Tokenizer.from_file(str(resume[0] / "tokenizer.json"))
        saved = load_file(resume[0] / "model.safetensors")
        model.load_state_dict({n.removeprefix("model."): t.float() for n, t in saved.items()}, strict=False)
    else:
        tokenizer = train_tokenizer((f"{p.description}\n{p.synopsis}" for p in members), SHAPE.vocab_size)
        initialise(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(members):,} packages", flush=True)
    torch.compiler.config.recompile_limit = len(LENGTHS)
    compiled = torch.compile(model, dynamic=False)
    groups = optimizers(model, lr)
    stream = Examples(members, tokenizer, seed + round(1000 * start))
    held_out = Examples([p for p in packages if split_of(p.source) == "validation"], tokenizer, seed)
    check = [held_out.one(p, i) for p in held_out.short[::4] for i in INSTRUCTIONS]
    began = time.monotonic()
    seen, step, mean, next_report = 0, 0, 0.0, 0.0
    for tokens, weights in stream.batches():
        progress = start + max(seen / max_tokens, (time.monotonic() - began) / 60 / max_minutes)
        if progress >= 1:
            break
        stream.copy_share = COPY_SHARE if progress > COPY_FROM else 0.0
        for group in groups:
            for g in group.param_groups:
                g["lr"] = lr * learning_rate(progress)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(compiled, model.embed_tokens.weight, tokens, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in groups:
            group.step()
            group.zero_grad(set_to_none=True)
        seen, step = seen + tokens.numel(), step + 1
        mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
        if time.monotonic() - began > next_report:
            next_report += 60
            speed = seen / (time.monotonic() - began)
            print(f"{step} steps {seen / 1e6:.2f}M tokens {speed:.0f}/s loss {mean:.3f}", flush=True)
            if int(next_report / 60) % 5 == 0:
                print(f"  section accuracy on validation {quick_accuracy(model, tokenizer, check):.3f}", flush=True)
                save(model, tokenizer, folder)
    save(model, tokenizer, folder)
    print(f"done: {step} steps, {seen:,} tokens, {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


@torch.no_grad()
def quick_accuracy(model: Llama, tokenizer: Tokenizer, examples: list[tuple[list[int], int]]) -> float:
    """The share of section answers whose every token is the most likely one, given the true tokens before it."""
    hits = []
    for ids, start in examples[::3]:
        if len(ids) <= SHAPE.max_position_embeddings:
            with torch.autocast("cpu", torch.bfloat16):
                best = model.logits(model(torch.tensor([ids]))[0, start - 1 : -1]).argmax(-1).tolist()
            hits.append(best == ids[start:])
    return sum(hits) / len(hits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lists", type=Path, required=True, help="folder with apt's Packages and Translation-en files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--tokens", type=int, default=120_000_000, help="padded training tokens at most")
    parser.add_argument("--minutes", type=float, default=90.0, help="training minutes at most")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--resume", type=Path, help="checkpoint of an interrupted training")
    parser.add_argument("--done", type=float, default=0.0, help="share of the training that --resume had done")
    a = parser.parse_args()
    resume = (a.resume, a.done) if a.resume else None
    train(read_index(a.lists), a.out, a.tokens, a.minutes, a.lr, a.seed, resume)


if __name__ == "__main__":
    main()
