"""The inner products of the clients' updates in one module, without a dense matrix: a part of their Gram matrix.

<Delta_i, Delta_j> = s_i s_j sum((B_i^T B_j) * (A_i A_j^T)), summed over blocks, in fp64; the bias of lora_B, which
PEFT scales too, counts as part of the update. It is of products, so a rotated client (B R, inv(R) A) has the same row.
A DoRA client counts with its effective update, a whole tensor with its distance from the base.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_merge.adapter import Factors
from lora_merge.aggregation import dora
from lora_merge.aggregation.module import Module, Share
from lora_merge.aggregation.whole import Value

TILE = 1 << 23  # entries of the clients' factors held in fp64 at a time, twice
TILE_RANK = 1024  # and their ranks together


class NotFinite(ValueError):
    """The updates of a module have no finite Gram matrix."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: the clients' updates have no finite inner products")
        self.name = name


def of_module(module: Module, clients: Sequence[str], *, biases: bool = True) -> Tensor | None:
    """<Delta_i, Delta_j> of one low-rank module, m x m on the CPU; absent clients have zeros.

    Clients are read a tile at a time, so that memory does not grow with m. None where a client trained DoRA and the
    base's weight is not at hand. Without `biases`, those of lora_B are left for `of_bias`.

    Raises:
        NotFinite: an inner product overflows.
        NotPositive: a DoRA client has no effective update.
    """
    if any(share.spec.magnitude for share in module.shares) and module.base_weight is None:
        return None
    D = _row_scales(module)
    tiles = list(_tiles(module.shares))
    blocks: list[list[Tensor]] = []
    for i, rows in enumerate(tiles):
        left = _factors(rows, D)
        blocks.append([_low_rank(left, left if j == i else _factors(tiles[j], D)) for j in range(i, len(tiles))])
    found = _symmetric(blocks)
    for part in (_biases(module) if biases else None, _magnitudes(module, D)):
        found = found if part is None else found + part
    if not torch.isfinite(found).all():
        raise NotFinite(module.name)
    return _placed(found, [share.client for share in module.shares], clients)


def of_value(value: Value, name: str, clients: Sequence[str]) -> Tensor | None:
    """<W_i - W0, W_j - W0> of a tensor that was trained whole; None where W0 is not at hand.

    Two clients' tensors are in memory at a time.
    """
    owners = [share.client for share in value.shares]
    if value.is_untrained:
        return torch.zeros(len(clients), len(clients), dtype=torch.float64)
    if value.base is None:
        return None
    base = value.base().to(value.shares[0].read().device)
    found = torch.zeros(len(owners), len(owners), dtype=torch.float64)
    for i, share in enumerate(value.shares):
        row = share.read()
        for j in range(i + 1):
            other = row if i == j else value.shares[j].read()
            found[i, j] = found[j, i] = _inner(row, other, base)
    if not torch.isfinite(found).all():
        raise NotFinite(name)
    return _placed(found, owners, clients)


def of_bias(value: Value, module: Module, name: str, clients: Sequence[str]) -> Tensor | None:
    """<u_i, u_j>, u_i = W_i - W0 + s_i b_i, of a bias that some trained whole and lora_B's biases add to.

    None where W0 is not at hand.
    """
    if value.base is None:
        return None
    rows = {share.client: bias for share in module.shares if (bias := _scaled_bias(share)) is not None}
    base = value.base().double().cpu()
    for share in value.shares:
        rows[share.client] = share.read().double().cpu() - base + rows.get(share.client, 0.0)
    owners = sorted(rows)
    stacked = torch.stack([rows[owner] for owner in owners])
    found = stacked @ stacked.mT
    if not torch.isfinite(found).all():
        raise NotFinite(name)
    return _placed(found, owners, clients)


def squared_norm(update: Factors) -> float:
    """|s B A|_F^2 of one plain update, its bias of lora_B included, from r x r matrices."""
    B, A = update.B.double(), update.A.double()
    square = ((B.mT @ B) * (A @ A.mT)).sum()
    if update.bias is not None:
        square = square + update.bias.double().square().sum()
    return update.scaling**2 * max(0.0, float(square))


def _tiles(shares: Sequence[Share]) -> Iterator[list[Share]]:
    """The shares in runs whose factors fit into TILE."""
    tile: list[Share] = []
    entries = rank = 0
    for share in shares:
        spec = share.spec
        size = spec.blocks * spec.r * (spec.d_out + spec.d_in)
        if tile and (entries + size > TILE or rank + spec.r > TILE_RANK):
            yield tile
            tile, entries, rank = [], 0, 0
        tile.append(share)
        entries, rank = entries + size, rank + spec.r
    yield tile


def _factors(tile: Sequence[Share], D: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """s_i D_i B_i side by side (E x d_out x K), A_i below each other (E x K x d_in), and whose each rank is (K x m)."""
    lefts, rights = [], []
    for share in tile:
        update = share.read()
        B = update.B.double() * share.spec.scaling
        lefts.append(B * D[share.client][:, None] if share.client in D else B)
        rights.append(update.A.double())
    ranks = torch.tensor([share.spec.r for share in tile])
    owners = torch.eye(len(tile), dtype=torch.float64).repeat_interleave(ranks, dim=0)
    return torch.cat(lefts, dim=2), torch.cat(rights, dim=1), owners.to(lefts[0])


def _low_rank(one: tuple[Tensor, Tensor, Tensor], two: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """<L_i R_i, L_j R_j> for the clients of two tiles."""
    (L, R, mine), (L_two, R_two, theirs) = one, two
    core = torch.zeros(L.shape[2], L_two.shape[2]).to(L)
    for block in range(len(L)):
        core += (L[block].mT @ L_two[block]) * (R[block] @ R_two[block].mT)
    return mine.mT @ core @ theirs


def _symmetric(blocks: Sequence[Sequence[Tensor]]) -> Tensor:
    """The whole matrix from the blocks on and right of its diagonal."""
    upper = [
        torch.cat([torch.zeros(len(row[0]), _width(blocks[:i])).to(row[0]), *row], dim=1)
        for i, row in enumerate(blocks)
    ]
    whole = torch.cat(upper).triu()
    return whole + whole.triu(1).mT


def _width(rows: Sequence[Sequence[Tensor]]) -> int:
    return sum(len(row[0]) for row in rows)


def _biases(module: Module) -> Tensor | None:
    """<s_i b_i, s_j b_j> of the biases of lora_B."""
    if not any(share.spec.bias for share in module.shares):
        return None
    biases = [_scaled_bias(share) for share in module.shares]
    size = next(len(bias) for bias in biases if bias is not None)
    rows = torch.stack([torch.zeros(size).double() if bias is None else bias for bias in biases])
    return (rows @ rows.mT).to(module.shares[0].read().B.device)


def _scaled_bias(share: Share) -> Tensor | None:
    """s b of the bias of lora_B, in fp64 on the CPU; None where there is none."""
    bias = share.read().bias
    return None if bias is None else share.spec.scaling * bias.double().cpu()


def _row_scales(module: Module) -> dict[str, Tensor]:
    """D_i of each DoRA client: its magnitude over the row norms of W0 + s B A."""
    having = [share for share in module.shares if share.spec.magnitude]
    if not having:
        return {}
    assert module.base_weight is not None
    W0 = module.base_weight()
    return {share.client: dora.row_scale(W0, share, share.read(), module.name) for share in having}


def _magnitudes(module: Module, D: Mapping[str, Tensor]) -> Tensor | None:
    """What DoRA adds: with Delta_i = (D_i - 1) W0 + L_i R_i, all inner products that W0 is part of."""
    if not D:
        return None
    assert module.base_weight is not None
    W0 = module.base_weight()
    one = torch.ones(W0.shape[0], dtype=torch.float64, device=W0.device)
    crosses, excess = [], torch.stack([D.get(share.client, one) - 1 for share in module.shares])  # m x d_out
    for share in module.shares:
        L, R, _ = _factors([share], D)
        crosses.append((L[0] * _times(W0, R[0].mT)).sum(dim=1))  # w_row . (L R)_row
    cross = torch.stack(crosses)
    mixed = excess @ cross.mT
    return (excess * _row_squares(W0)) @ excess.mT + mixed + mixed.mT


def _times(W0: Tensor, right: Tensor) -> Tensor:
    return torch.cat([part.double() @ right for part in dora.row_parts(W0)])


def _row_squares(W0: Tensor) -> Tensor:
    return torch.cat([part.double().square().sum(dim=1) for part in dora.row_parts(W0)])


def _inner(one: Tensor, two: Tensor, base: Tensor) -> float:
    """<one - base, two - base> in fp64, a part at a time."""
    parts = zip(*(torch.split(tensor.reshape(-1), dora.CHUNK) for tensor in (one, two, base)), strict=True)
    return sum(float((a.double() - w.double()) @ (b.double() - w.double())) for a, b, w in parts)


def _placed(found: Tensor, owners: Sequence[str], clients: Sequence[str]) -> Tensor:
    """The owners' matrix within that of all clients."""
    at = torch.tensor([clients.index(owner) for owner in owners])
    matrix = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    matrix[at[:, None], at] = found.cpu()
    return matrix
