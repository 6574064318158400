"""A training step of Dia2 written out in PyTorch, and what it recorded for the tests.

    python tests/golden/training/record.py

(in an environment with torch) writes ``gradients.npz``: the losses of a small network and the
gradient of each of its parameters. What it is computed from is in inputs.py beside this file,
which the tests read too. Before it records, the network written here is run on the golden
checkpoints in ../network and must give the numbers of the published implementation.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from inputs import CONFIG, LOSSES, batch, shapes, weight

HERE = Path(__file__).parent


# ----------------------------------------------------------------------------- the network, PyTorch


class Network:
    """Whole-sequence forward of decoder and depformer over a dict of tensors."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Any]) -> None:
        self.config, self.weights = config, weights
        self.model = config["model"]

    def linear(self, name: str, x: Any) -> Any:
        return x @ self.weights[f"{name}.weight"].T

    def norm(self, name: str, x: Any) -> Any:
        mean = (x * x).mean(dim=-1, keepdim=True)
        root = (mean + self.model["normalization_layer_epsilon"]).sqrt()
        return x / root * self.weights[f"{name}.weight"]

    def rotate(self, x: Any) -> Any:
        """``[B, T, heads, H]``: plane (i, i + H / 2) of step t turned by t / timescale_i."""
        import torch

        half = x.shape[-1] // 2
        low, high = self.model["rope_min_timescale"], self.model["rope_max_timescale"]
        timescale = low * (high / low) ** (torch.arange(half, dtype=x.dtype) / half)
        angle = (torch.arange(x.shape[1])[:, None] / timescale)[:, None]
        first, second = x[..., :half], x[..., half:]
        turned = [
            first * angle.cos() - second * angle.sin(),
            first * angle.sin() + second * angle.cos(),
        ]
        return torch.cat(turned, dim=-1)

    def attend(self, name: str, query: Any, keys: Any, values: Any, *, rope: bool) -> Any:
        """Causal attention of ``[B, T, heads, H]`` with normalised queries and keys, scale 1."""
        import torch

        query = self.norm(f"{name}.q_norm", query)
        keys = self.norm(f"{name}.k_norm", keys)
        if rope:
            query, keys = self.rotate(query), self.rotate(keys)
        steps, heads = query.shape[1:3]
        keys, values = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (keys, values))
        scores = torch.einsum("btnh,bsnh->bnts", query, keys)
        future = torch.ones(steps, steps, dtype=torch.bool).triu(1)
        share = scores.masked_fill(future, -math.inf).softmax(dim=-1)
        return torch.einsum("bnts,bsnh->btnh", share, values).flatten(2)

    def mlp(self, name: str, x: Any, activations: list[str]) -> Any:
        from torch.nn import functional

        known = {
            "silu": functional.silu,
            "swiglu": functional.silu,
            "swish": functional.silu,
            "gelu": functional.gelu,
            "relu": functional.relu,
            "linear": lambda y: y,
        }
        gate, up = self.linear(f"{name}.wi", x).chunk(2, dim=-1)
        first, second = (known[each.lower()] for each in activations)
        return self.linear(f"{name}.wo", first(gate) * second(up))

    def text(self, name: str, main: Any, second: Any) -> Any:
        table = self.weights[f"{name}.embedding.weight"]
        spoken = (second != self.config["data"]["text_pad_token_id"])[..., None]
        ahead = self.linear(f"{name}.second_proj", table[second])
        return self.linear(f"{name}.main_proj", table[main]) + spoken * ahead

    def decoder(self, tokens: Any) -> tuple[Any, Any, Any]:
        """``[B, 2 + C, T]`` tokens to hidden state, action logits and codebook 0 logits."""
        shape = self.model["decoder"]
        x = self.text("transformer.text_embed", tokens[:, 0], tokens[:, 1])
        for book in range(tokens.shape[1] - 2):
            x = x + self.weights[f"transformer.audio_embeds.{book}.weight"][tokens[:, 2 + book]]
        for layer in range(shape["n_layer"]):
            name = f"transformer.layers.{layer}"
            y = self.norm(f"{name}.pre_norm", x)
            query, keys, values = (
                self.linear(f"{name}.attn.{part}_proj", y).unflatten(
                    -1, (-1, shape["gqa_head_dim"])
                )
                for part in "qkv"
            )
            mixed = self.attend(f"{name}.attn", query, keys, values, rope=True)
            x = x + self.linear(f"{name}.attn.o_proj", mixed)
            y = self.norm(f"{name}.post_norm", x)
            x = x + self.mlp(f"{name}.mlp", y, self.model["linear"]["mlp_activations"])
        hidden = self.norm("transformer.norm", x)
        action = self.linear("transformer.action_head", hidden)
        return hidden, action, self.linear("transformer.cb0_head", hidden)

    def depformer(self, previous: Any, hidden: Any, main: Any, second: Any) -> Any:
        """Codebooks 0 to C - 2 of N frames and their states to logits ``[N, C - 1, V]``."""
        import torch

        data, shape = self.config["data"], self.model["depformer"]
        schedule = self.config["runtime"]["weights_schedule"]
        stages = []
        for stage, index in enumerate(schedule):
            table = self.weights[f"depformer.audio_embeds.{stage}.weight"]
            x = self.linear(f"depformer.depformer_in.{index}", hidden) + table[previous[:, stage]]
            if stage == 0 and shape["text_embedding"]:
                x = x + self.text("depformer.text_embed", main, second)
            stages.append(x)
        x = torch.stack(stages, dim=1)

        def scheduled(name: str, y: Any) -> Any:
            parts = [self.linear(f"{name}.{i}", y[:, s]) for s, i in enumerate(schedule)]
            return torch.stack(parts, dim=1)

        for layer in range(shape["n_layer"]):
            name = f"depformer.layers.{layer}"
            fused = scheduled(f"{name}.self_attention.in_proj", self.norm(f"{name}.pre_norm", x))
            query, keys, values = (
                part.unflatten(-1, (-1, shape["gqa_head_dim"])) for part in fused.chunk(3, dim=-1)
            )
            mixed = self.attend(
                f"{name}.self_attention", query, keys, values, rope=shape["apply_rope"]
            )
            x = x + scheduled(f"{name}.self_attention.out_proj", mixed)
            y = self.norm(f"{name}.post_norm", x)
            x = x + self.mlp(f"{name}.mlp", y, shape["mlp_activations"])
        x = self.norm("depformer.norm", x)
        logits = [self.linear(f"depformer.logits.{s}", x[:, s]) for s in range(len(schedule))]
        words = min(data["audio_pad_token_id"], data["audio_bos_token_id"])
        return torch.stack(logits, dim=1)[..., :words]


# -------------------------------------------------------------------------------- the loss, PyTorch


def token_loss(logits: Any, target: Any, settings: dict[str, Any]) -> Any:
    """Cross-entropy of each token against the smoothed one-hot target, and the z-loss."""
    import torch

    share = settings["label_smoothing"]
    wanted = torch.nn.functional.one_hot(target.long(), logits.shape[-1]).to(logits.dtype)
    wanted = (1 - share) * wanted + share / logits.shape[-1]
    entropy = -(wanted * torch.log_softmax(logits, dim=-1)).sum(dim=-1)
    return entropy + settings["z_loss"] * torch.logsumexp(logits, dim=-1) ** 2


def losses(network: Network, given: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Components and total of a batch."""
    import torch

    hidden, action, cb0 = network.decoder(given["tokens"])
    weights = torch.zeros(given["action"].shape, dtype=hidden.dtype)
    for row in range(weights.shape[0]):
        for step in range(weights.shape[1]):
            if given["action_known"][row, step]:
                value = 1.0 if given["action"][row, step] else settings["action_padding_weight"]
                if not given["action_free"][row, step]:
                    value *= settings["overruled_action_weight"]
                weights[row, step] = value
    action_loss = (weights * token_loss(action, given["action"], settings)).sum() / weights.sum()
    code_loss = token_loss(cb0, given["code"], settings)[given["code_known"]].mean()

    chosen = torch.stack([hidden[b, given["depth_index"][b].long()] for b in range(len(hidden))])
    codes = given["depth_codes"].flatten(0, 1)
    text = given["depth_text"].flatten(0, 1)
    logits = network.depformer(codes[:, :-1], chosen.flatten(0, 1), text[:, 0], text[:, 1])
    each = token_loss(logits, codes[:, 1:], settings)
    known = given["depth_known"].flatten(0, 1)
    if settings["depth"] == "pooled":
        depth_loss = each[known].mean()
    else:
        books = range(known.shape[1])
        depth_loss = torch.stack([each[:, b][known[:, b]].mean() for b in books]).mean()
    first, others = settings["first_codebook_multiplier"], known.shape[1]
    audio = (first * code_loss + others * depth_loss) / (first + others)
    return {
        "loss": settings["action_weight"] * action_loss + audio,
        "loss/action": action_loss,
        "loss/code_0": code_loss,
        "loss/depth": depth_loss,
    }


# ------------------------------------------------------------------------------------ the recording


def check_against_published(folder: Path) -> float:
    """Largest difference to what the published implementation computed from ``folder``."""
    import torch
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    config["data"].setdefault("audio_pad_token_id", config["data"]["audio_vocab_size"] - 1)
    config["data"].setdefault("audio_bos_token_id", config["data"]["audio_vocab_size"] - 2)
    network = Network(config, load_file(folder / "model.safetensors"))
    values = {name: torch.from_numpy(x) for name, x in np.load(folder / "network.npz").items()}
    found = network.decoder(values["tokens"].long())
    wanted = (values[name] for name in ("hidden", "action", "cb0"))
    pairs = [(mine.swapaxes(0, 1), theirs) for mine, theirs in zip(found, wanted, strict=True)]
    logits = values["dep_logits"]
    stages = logits.shape[1]
    mine = network.depformer(
        values["dep_in"].swapaxes(1, 2).reshape(-1, stages).long(),
        values["hidden"].flatten(0, 1),
        values["dep_main"].flatten().long(),
        values["dep_second"].flatten().long(),
    )
    pairs.append((mine.unflatten(0, (len(logits), -1)).swapaxes(1, 2), logits))
    return max(float((mine - theirs).abs().max()) for mine, theirs in pairs)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for folder in sorted((HERE.parent / "network").iterdir()):
        if folder.is_dir():
            worst = check_against_published(folder)
            print(f"{folder.name}: largest difference to the published implementation {worst:.1e}")
            assert worst < 1e-4
    given = {name: torch.from_numpy(value) for name, value in batch().items()}
    given["tokens"] = given["tokens"].long()
    recorded: dict[str, np.ndarray] = {}
    for name, settings in LOSSES.items():
        # Recorded in float64, so that only the float32 of the test is measured.
        weights = {
            path: torch.from_numpy(weight(path, shape)).double().requires_grad_()
            for path, shape in shapes(CONFIG).items()
        }
        found = losses(Network(CONFIG, weights), given, settings)
        found["loss"].backward()
        values = np.array([value.item() for value in found.values()])
        recorded[f"{name} losses"] = values
        recorded[f"{name} gradients"] = np.concatenate(
            [tensor.grad.numpy().ravel() for tensor in weights.values()]
        ).astype(np.float32)
        print(name, dict(zip(found, values.round(6), strict=True)))
    np.savez_compressed(HERE / "gradients.npz", **recorded)


if __name__ == "__main__":
    main()
