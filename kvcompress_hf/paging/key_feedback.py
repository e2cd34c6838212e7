"""How the rounding error of one channel of a key is made good by the channels after it.

What matters of a key's error `e` is `q.e` for the queries to come, so its square counts by their second moment `H`: as
`e'He`, and not by its length. Queries of trained models are far from alike in all directions. So channels are rounded
one after the other, each to what makes good, as the queries see it, the errors of those before it (GPTQ, arXiv
2210.17323, and its equal LDLQ, arXiv 2307.13304, do so with weights). `H` is taken from the first prompt and kept as a
multiple of the identity plus a few directions, so that it takes little room and time.
"""

import torch

from kvcompress_hf.kernels.abi import FEEDBACK_RANK
from kvcompress_hf.kernels.quantize import hadamard
from kvcompress_hf.paging.key_shift import evenly_spread
from kvcompress_hf.paging.sequence_tensors import Declared, SequenceTensors

KEY_FEEDBACK = Declared(
    "key_feedback",
    torch.bfloat16,
    ("layers", "batch", "kv_heads", 2, FEEDBACK_RANK, "head_dim"),
    kind="metadata",
    changed_by="nothing",
    shared=True,
)
_QUERIES = 256  # tokens of a prompt that are looked at, evenly spread
_LEAST_TOKENS = 64  # of a sequence; fewer say too little about those to come
_STEPS = 4  # of the iteration that finds the directions
_DAMPING = 0.1  # of the mean square that is added for what queries to come may bring


class KeyFeedback:
    """How each row rounds its rotated keys; none until it is settled.

    Args:
        tensors (`SequenceTensors`): The store's tensors, the feedback among them.
    """

    def __init__(self, tensors: SequenceTensors) -> None:
        self.tensors = tensors

    @property
    def value(self) -> torch.Tensor | None:
        """`torch.Tensor` or `None`: bfloat16 `[layers, batch, kv_heads, 2, rank, head_dim]`."""
        return self.tensors.values.get("key_feedback")

    def settle(
        self, layer: int, query: torch.Tensor, real: torch.Tensor | None, sequences: torch.Tensor | None = None
    ) -> None:
        """Decides how keys of a layer are rounded that are packed from now on.

        Args:
            layer (`int`): Index of the layer.
            query (`torch.Tensor`): Queries of the first tokens, `[batch, q_heads, queries, head_dim]`.
            real (`torch.Tensor`, *optional*): `bool` `[batch, queries]`, false for padding.
            sequences (`torch.Tensor`, *optional*): `bool` `[batch]`, those that have stored nothing yet; all when left
                out.
        """
        old = self.value
        with torch.inference_mode(False):
            feedback = self.tensors.zeros("key_feedback") if old is None else old.clone()  # forks may share it
        found = key_feedback(query, feedback.shape[2], real)
        if sequences is not None:
            found = torch.where(sequences[:, None, None, None, None], found, feedback[layer])
        feedback[layer] = found
        self.tensors.values["key_feedback"] = feedback
        self.tensors.moved()

    def drop(self) -> None:
        """Forgets it, and gives its memory back."""
        if self.value is not None:
            rest = {name: x for name, x in self.tensors.values.items() if name != "key_feedback"}
            self.tensors.replace(rest)


def key_feedback(query: torch.Tensor, kv_heads: int, real: torch.Tensor | None = None) -> torch.Tensor:
    """Directions in which errors are collected, and how much of them each channel makes good.

    Args:
        query (`torch.Tensor`): Queries of a prompt, `[batch, q_heads, queries, head_dim]`.
        kv_heads (`int`): Heads of the keys.
        real (`torch.Tensor`, *optional*): `bool` `[batch, queries]`, false for padding.

    Returns:
        `torch.Tensor`: `[batch, kv_heads, 2, rank, head_dim]` in bfloat16, for Hadamard-rotated keys: what a channel
        makes good per unit of the collected error, and what a unit of its own error adds to it. Zero for a sequence of
        too few tokens.
    """
    dim = query.shape[-1]
    if real is None:
        looks = query[:, :, :: 1 + (query.shape[2] - 1) // _QUERIES].float()
        enough = torch.full((), query.shape[2] >= _LEAST_TOKENS, device=query.device)
    else:
        index, used = evenly_spread(real, _QUERIES)
        looks = torch.stack([one.index_select(1, chosen).float() for one, chosen in zip(query, index, strict=True)])
        looks = looks.masked_fill(~used[:, None, :, None], 0.0)
        enough = (real.sum(1) >= _LEAST_TOKENS)[:, None, None, None, None]
    looks = looks.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    moment = looks.transpose(-1, -2) @ looks
    for _ in range(2):  # of rotated queries: turned from both sides, and symmetric
        moment = hadamard(moment, dim & -dim).transpose(-1, -2)
    moment = moment / moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-20)[..., None, None]
    collect, rest = _directions(moment)
    made_good = _coefficients(collect, rest)
    found = torch.stack((made_good, collect), dim=2)
    return torch.where(enough, found.nan_to_num(), 0.0).bfloat16()


def _directions(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as `rest * I + U'U`, by subspace iteration: `U` `[..., rank, dim]` and `rest` `[...]`."""
    dim, rank = moment.shape[-1], FEEDBACK_RANK
    basis = moment[..., :: dim // rank, :]
    for _ in range(_STEPS):
        basis = _orthonormal(basis) @ moment
    basis = _orthonormal(basis)
    inner = basis @ moment @ basis.transpose(-1, -2)
    rest = (dim - inner.diagonal(dim1=-2, dim2=-1).sum(-1)) / (dim - rank) + _DAMPING
    return _triangle(inner).transpose(-1, -2) @ basis, rest


def _orthonormal(rows: torch.Tensor) -> torch.Tensor:
    # Twice, as the first time loses what single precision has to give.
    for _ in range(2):
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-20)
        rows = torch.linalg.solve_triangular(_triangle(rows @ rows.transpose(-1, -2)), rows, upper=False)
    return rows


def _triangle(matrix: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor, without waiting to see whether there is one."""
    eye = torch.eye(matrix.shape[-1], device=matrix.device)
    return torch.linalg.cholesky_ex(matrix + 1e-6 * eye).L


def _coefficients(collect: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """What each channel has to make good per unit of the error collected so far, if later ones do as well."""
    u = collect.transpose(-1, -2)  # [..., dim, rank]
    later = (u[..., :, None] * u[..., None, :]).flip(-3).cumsum(-3).flip(-3)
    eye = torch.eye(u.shape[-1], device=u.device)
    solved = torch.linalg.solve_ex(later + rest[..., None, None, None] * eye, u[..., None]).result
    return solved[..., 0].transpose(-1, -2)
