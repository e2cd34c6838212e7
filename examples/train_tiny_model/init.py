"""Write a LlamaForCausalLM whose *initialisation* already holds induction circuits; the rest is random.

Residual stream (256 wide) at initialisation: dimension 0 is a constant, 1-127 the token's random
embedding, 128-191 the previous token (written by layer 0, head 0), 192-255 a blurred bag of the last ~20
tokens (layer 0, head 4). Heads 0 and 4 of layer 1 look for positions whose previous token equals the
current token and copy what stands there. Those of layer 2 do the same but add the likeness of the two
bags, so that of two facts the right one can win. Only rotary frequencies that hardly turn within the
context carry the content match.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 4096, 256, 8, 2, 64
GROUP = HEADS // KV_HEADS
TOKEN, PREV, BAG = slice(1, 128), slice(128, 192), slice(192, 256)


def config(layers: int, theta: float) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=3072,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        rope_theta=theta,
        initializer_range=0.02,
        attn_implementation="sdpa",
    )


def positional_query(inv: torch.Tensor, pairs: range, distance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(query, key) patterns whose rotary score peaks ``distance`` tokens back, on the frequency ``pairs``."""
    half = HEAD_DIM // 2
    mask = torch.zeros(half)
    mask[list(pairs)] = 1.0
    query = torch.cat([torch.cos(inv * distance) * mask, -torch.sin(inv * distance) * mask])
    return query, torch.cat([mask, torch.zeros(half)])


@torch.no_grad()
def place_circuits(model: LlamaForCausalLM, theta: float, copy: float, bag_share: float) -> None:
    e = 0.05
    emb = model.model.embed_tokens.weight
    emb.zero_()
    emb[:, 0] = 4 * e
    t = torch.randn(VOCAB, 127)
    emb[:, TOKEN] = t / t.norm(dim=1, keepdim=True) * math.sqrt(127) * e
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.5)
        layer.mlp.down_proj.weight.mul_(0.5)

    half = HEAD_DIM // 2
    inv = theta ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    scale0 = math.sqrt(HIDDEN) / math.sqrt((127 + 16) * e * e)  # what the first RMSNorm multiplies by
    x0 = 4 * e * scale0
    basis = torch.linalg.qr(torch.randn(127, 127))[0]
    part_a, part_b = basis[:64], basis[63:127]
    attn = model.model.layers[0].self_attn

    # layer 0, head 0 (KV head 0): attend to the previous token, write it to PREV
    q, k = positional_query(inv, range(8), 1.0)
    s = math.sqrt(9 * 8 / (0.84 * x0 * x0))
    rows = slice(0, HEAD_DIM)
    attn.k_proj.weight[rows] = 0
    attn.k_proj.weight[rows, 0] = s * k
    attn.q_proj.weight[rows] = 0
    attn.q_proj.weight[rows, 0] = s * q
    attn.v_proj.weight[rows] = 0
    attn.v_proj.weight[rows, TOKEN] = part_a
    attn.o_proj.weight[:, rows] = 0
    attn.o_proj.weight[PREV, rows] = torch.eye(64) / scale0

    # layer 0, head 4 (KV head 1): attend smoothly to the last ~20 tokens, write their mean, enlarged, to BAG
    q, k = positional_query(inv, range(4, 14), 8.0)
    s = math.sqrt(9 * 8 / (x0 * x0))
    rows, hrows = slice(HEAD_DIM, 2 * HEAD_DIM), slice(GROUP * HEAD_DIM, (GROUP + 1) * HEAD_DIM)
    attn.k_proj.weight[rows] = 0
    attn.k_proj.weight[rows, 0] = s * k
    attn.q_proj.weight[hrows] = 0
    attn.q_proj.weight[hrows, 0] = s * q
    attn.v_proj.weight[rows] = 0
    attn.v_proj.weight[rows, TOKEN] = part_b
    attn.o_proj.weight[:, hrows] = 0
    attn.o_proj.weight[BAG, hrows] = 4.0 * torch.eye(64) / scale0

    # layers 1 and 2, heads 0 and 4: match, then copy one half of the token each
    scale1 = math.sqrt(HIDDEN) / math.sqrt((127 + 16 + 64 + 64) * e * e)
    st = e * scale1
    slow = [i for i in range(half) if inv[i] < 1.5e-3]
    for layer, share in ((1, 0.0), (2, bag_share)):
        attn = model.model.layers[layer].self_attn
        n_bag = round(len(slow) * share)
        bag_dims = [d for i in slow[:n_bag] for d in (i, i + half)]
        tok_dims = [d for i in slow[n_bag:] for d in (i, i + half)]
        for kv in range(KV_HEADS):
            h = kv * GROUP
            wq, wk = torch.zeros(HEAD_DIM, HIDDEN), torch.zeros(HEAD_DIM, HIDDEN)
            a = torch.linalg.qr(torch.randn(64, 64))[0][: len(tok_dims)] * math.sqrt(64 / len(tok_dims))
            s1 = math.sqrt(14 * 8 / (64 * st * st))
            wq[tok_dims, TOKEN] = s1 * (a @ part_a)
            wk[tok_dims, PREV] = s1 * a
            if n_bag:
                a = torch.linalg.qr(torch.randn(64, 64))[0][: len(bag_dims)] * math.sqrt(64 / len(bag_dims))
                wq[bag_dims, BAG] = s1 * a
                wk[bag_dims, BAG] = s1 * a
            attn.q_proj.weight[h * HEAD_DIM : (h + 1) * HEAD_DIM] = wq
            attn.k_proj.weight[kv * HEAD_DIM : (kv + 1) * HEAD_DIM] = wk
            part = (part_a, part_b)[kv]
            attn.v_proj.weight[kv * HEAD_DIM : (kv + 1) * HEAD_DIM] = 0
            attn.v_proj.weight[kv * HEAD_DIM : (kv + 1) * HEAD_DIM, TOKEN] = part
            attn.o_proj.weight[:, h * HEAD_DIM : (h + 1) * HEAD_DIM] = 0
            attn.o_proj.weight[TOKEN, h * HEAD_DIM : (h + 1) * HEAD_DIM] = part.T * copy


@torch.no_grad()
def check(model: LlamaForCausalLM) -> None:
    """Loss and accuracy on the second pass of a random sequence given twice, over many or few tokens."""
    gen = torch.Generator().manual_seed(0)
    for n, distinct in ((100, 3000), (400, 3000), (1100, 3000), (100, 10), (400, 40), (1100, 100)):
        s = torch.randint(300, 300 + distinct, (4, n), generator=gen)
        x = torch.cat([torch.full((4, 1), 1), s, s], 1)
        logits = model(x).logits[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none")
        acc = (logits.argmax(-1) == x[:, 1:]).float()
        second = slice(n + 2, None)
        print(
            f"{n} tokens of {distinct} kinds, twice: loss {loss[:, :n].mean():.2f} "
            f"then {loss[:, second].mean():.2f}, accuracy of the second pass {acc[:, second].mean():.3f}"
        )


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--layers", type=int, default=4)
    ap.add_argument("--theta", type=float, default=4e6, help="rope_theta")
    ap.add_argument("--copy", type=float, default=0.3, help="strength of the copying heads' output")
    ap.add_argument("--bag-share", type=float, default=0.5, help="share of layer 2's match given to the bag")
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(config(args.layers, args.theta)).eval()
    place_circuits(model, args.theta, args.copy, args.bag_share)
    model.save_pretrained(args.out)
    check(model)


if __name__ == "__main__":
    main()
