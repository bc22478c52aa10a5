"""Train a small language model that was born a Mixture of Experts, for measuring on.

    python -m benchmarks.natural_moe FOLDER --data a.txt --data b.txt ... --tokens 4000000

6 layers of width 256, fp32, on the CPU, from random weights and on the given UTF-8 text. `olmoe`
and `qwen3_moe` have 32 experts of 128 neurons, top-4 (23 million parameters, 6 of them active):
`--architecture olmoe` takes the gate weights from a softmax over all experts, `qwen3_moe` makes
those of the chosen ones add up to 1 and shares keys and values between heads. `mixtral` has 16 wide
experts of 512 neurons, top-2 (41 million, 8 of them active). Started again with the same FOLDER it
goes on from its last checkpoint until it has read that many tokens. FOLDER then holds

    model/             the checkpoint (convert it with `--tokenizer-pre gpt-2`)
    initial/           the same before training: `router-norm` compares the two
    calibration/*.txt  every 8th block of each file's training text; calibration.txt: of all files
    heldout/*.txt      every 40th block of each file, never trained on; all of them in heldout.txt
    log.jsonl          loss, held-out loss and expert load over time

The load is balanced in every layer by itself. The auxiliary loss of transformers' OLMoE adds the
layers up first, under which an expert may be dead in one layer if it is busy in another.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCAB, SEQUENCE, BATCH = 4096, 256, 8
BLOCK_CHARS, HELDOUT_EVERY, CALIBRATION_EVERY = 16_384, 40, 8
END = "<|endoftext|>"
PEAK_LR, WARMUP_STEPS, DECAY_FROM = 1.5e-3, 100, 0.6
BALANCE, Z_LOSS = 0.02, 1e-3
CHECKPOINT_SECONDS, LOG_STEPS = 240, 20


def blocks(text: str) -> list[str]:
    """Cut at line ends, about `BLOCK_CHARS` each."""
    found, start = [], 0
    while start < len(text):
        end = text.find("\n", start + BLOCK_CHARS) + 1 or len(text)
        found.append(text[start:end])
        start = end
    return found


def prepare(folder: Path, data: list[Path], seed: int) -> None:
    """Split the text, train the tokenizer, write training and held-out tokens."""
    train, heldout = [], []
    for name in ("heldout", "calibration"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for path in data:
        parts = blocks(path.read_text(encoding="utf-8"))
        kept = parts[HELDOUT_EVERY // 2 :: HELDOUT_EVERY]
        others = [p for i, p in enumerate(parts) if i % HELDOUT_EVERY != HELDOUT_EVERY // 2]
        train += others
        heldout += kept
        for name, chosen in (("heldout", kept), ("calibration", others[::CALIBRATION_EVERY])):
            text = "\n\n".join(chosen)
            (folder / name / f"{path.stem}.txt").write_text(text, encoding="utf-8")
    np.random.default_rng(seed).shuffle(train)
    (folder / "heldout.txt").write_text("\n\n".join(heldout), encoding="utf-8")
    sample = train[::CALIBRATION_EVERY]
    (folder / "calibration.txt").write_text("\n\n".join(sample), encoding="utf-8")
    tokenizer = make_tokenizer(train)
    tokenizer.save_pretrained(folder / "initial")
    for name, texts in (("train", train), ("heldout", heldout)):
        encoded = tokenizer([text + END for text in texts])["input_ids"]
        tokens = np.concatenate([np.asarray(ids, dtype=np.uint16) for ids in encoded])
        np.save(folder / f"{name}.part.npy", tokens)
        (folder / f"{name}.part.npy").replace(folder / f"{name}.npy")


def make_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE with GPT-2's pre-tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=END)


FINE_GRAINED = {"num_experts": 32, "num_experts_per_tok": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "olmoe": FINE_GRAINED
    | {"intermediate_size": 128, "num_key_value_heads": 4, "norm_topk_prob": False},
    "qwen3_moe": FINE_GRAINED
    | {
        "intermediate_size": 512,  # of dense layers, of which there are none
        "moe_intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "norm_topk_prob": True,
    },
    "mixtral": {
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "intermediate_size": 512,
        "num_key_value_heads": 2,
    },
}


def make_model(architecture: str, seed: int) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **ARCHITECTURES[architecture],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if architecture == "olmoe":
        with torch.no_grad():  # top-4 of 32 near-equal weights add up to 1/8 at first
            for layer in model.model.layers:
                layer.mlp.experts.down_proj.mul_(4)
    model.set_experts_implementation("grouped_mm")
    return model


def balance(router_logits: Any, top_k: int) -> tuple[Any, Any, Any]:
    """Switch's auxiliary loss (arXiv 2101.03961, eq. 4-6) and ST-MoE's z-loss, layer by layer.

    Returns:
        mean over layers of both losses, and the tokens of each expert [layers, experts].
    """
    import torch

    aux, z, loads = [], [], []
    for logits in router_logits:  # [tokens, experts]
        experts = logits.shape[-1]
        chosen = logits.topk(top_k, dim=-1).indices.reshape(-1)
        load = torch.bincount(chosen, minlength=experts)
        share = load / chosen.numel()
        aux.append(experts * (share * logits.softmax(-1).mean(0)).sum())
        z.append(logits.logsumexp(-1).square().mean())
        loads.append(load)
    return torch.stack(aux).mean(), torch.stack(z).mean(), torch.stack(loads)


@dataclass
class Run:
    """A training run: how long it is, and where it is."""

    folder: Path
    model: Any
    optimizer: Any
    steps: int
    seed: int
    step: int = 0

    @classmethod
    def resume(cls, folder: Path, architecture: str, steps: int, seed: int) -> "Run":
        import torch

        model = make_model(architecture, seed)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), foreach=True)
        run = cls(folder, model, optimizer, steps, seed)
        if (folder / "state.pt").exists():
            state = torch.load(folder / "state.pt", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            run.step = state["step"]
        else:
            model.save_pretrained(folder / "initial")
        return run

    def learning_rate(self) -> float:
        """Warm up, stay, and fall linearly over the last of the steps."""
        falling = max(0.02, min(1.0, (1 - self.step / self.steps) / (1 - DECAY_FROM)))
        return PEAK_LR * min(1.0, (self.step + 1) / WARMUP_STEPS) * falling

    def batch(self, tokens: Any) -> Any:
        """[BATCH, SEQUENCE] windows; another seeded order in each epoch."""
        import torch

        windows = len(tokens) // SEQUENCE
        epoch, place = divmod(self.step * BATCH, windows - windows % BATCH)
        order = np.random.default_rng([self.seed, epoch]).permutation(windows)[place:][:BATCH]
        rows = [tokens[i * SEQUENCE : (i + 1) * SEQUENCE] for i in order]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def update(self, ids: Any) -> tuple[float, Any]:
        """One step of AdamW; the language model's loss in nats, the load [layers, experts]."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        out = self.model(input_ids=ids, labels=ids, output_router_logits=False)
        routers = self.router_logits
        aux, z, load = balance(routers, self.model.config.num_experts_per_tok)
        (out.loss + BALANCE * aux + Z_LOSS * z).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(out.loss.detach()), load

    @property
    def router_logits(self) -> list[Any]:
        return [layer.mlp.gate.seen for layer in self.model.model.layers]

    def heldout_loss(self, tokens: Any, windows: int = 32) -> float:
        import torch

        stride = max(SEQUENCE, len(tokens) // windows)
        windows = min(windows, len(tokens) // stride)
        rows = np.stack([tokens[i * stride :][:SEQUENCE] for i in range(windows)])
        ids = torch.from_numpy(rows.astype(np.int64))
        with torch.inference_mode():
            return float(self.model(input_ids=ids, labels=ids).loss)

    def save(self) -> None:
        import torch

        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"step": self.step}, self.folder / "state.part")
        (self.folder / "state.part").replace(self.folder / "state.pt")

    def export(self) -> None:
        """`model/` as transformers and the converter read it."""
        from transformers import AutoTokenizer

        self.model.save_pretrained(self.folder / "model")
        AutoTokenizer.from_pretrained(self.folder / "initial").save_pretrained(
            self.folder / "model"
        )


def watch_routers(model: Any) -> None:
    """Keep each router's logits [tokens, experts] of the last forward pass, with their graph."""
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, _, out: setattr(gate, "seen", out[0]))


def train(run: Run) -> None:
    tokens, heldout = (
        np.load(run.folder / f"{n}.npy", mmap_mode="r") for n in ("train", "heldout")
    )
    watch_routers(run.model)
    saved, losses, loads = time.monotonic(), [], []
    while run.step < run.steps:
        loss, load = run.update(run.batch(tokens))
        losses.append(loss)
        loads.append(load)
        if run.step % LOG_STEPS == 0:
            share = sum(loads) / sum(loads).sum(1, keepdim=True) * load.shape[1]
            report(run, loss=float(np.mean(losses)), load=share)
            losses, loads = [], []
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            report(run, heldout_loss=run.heldout_loss(heldout))
            run.save()
            run.export()
            saved = time.monotonic()
    report(run, heldout_loss=run.heldout_loss(heldout, windows=256))
    run.save()
    run.export()


def report(run: Run, load: Any = None, **losses: float) -> None:
    """A line to the terminal and to log.jsonl. Load 1 is an expert's equal share."""
    line: dict[str, Any] = {"step": run.step, "tokens": run.step * BATCH * SEQUENCE, **losses}
    if load is not None:
        least, most = load.min(1).values, load.max(1).values
        line |= {"load_min": round(float(least.min()), 3), "load_max": round(float(most.max()), 3)}
        line["dead"] = int((load < 0.01).sum())
    with (run.folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(
        " ".join(f"{k} {v:.4f}" if "loss" in k else f"{k} {v}" for k, v in line.items()), flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, action="append", required=True, help="UTF-8 text")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="olmoe")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="to read, over all starts")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    if not (arguments.folder / "heldout.npy").exists():
        prepare(arguments.folder, arguments.data, arguments.seed)
    steps = arguments.tokens // (BATCH * SEQUENCE)
    train(Run.resume(arguments.folder, arguments.architecture, steps, arguments.seed))


if __name__ == "__main__":
    main()
