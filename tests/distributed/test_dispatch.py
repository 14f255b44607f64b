"""Expert parallel dispatch gives what the local dispatcher gives: outputs, gradients, loads. It moves no row twice."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from moetrain_launch.fork import run_ranks

from moetrain.config.errors import ConfigError
from moetrain.moe.dispatch import build_dispatcher
from tests.distributed.moe_ranks import D, E, Spread, compare, owners

CASES = [
    ("dropless", [13, 8]),
    ("dropless", [0, 9]),
    ("dropless", [0, 0]),
    ("hot expert", [6, 7]),
    ("drops", [20, 11]),
    ("dropless", [5, 9, 3, 8]),
    ("dropless", [0, 12, 0, 1]),
    ("hot expert", [4, 0, 5, 3]),
    ("drops", [9, 0, 16, 5]),
]


@pytest.mark.parametrize(("case", "sizes"), CASES, ids=lambda v: str(v))
@pytest.mark.parametrize("kind", ["all_to_all", "all_gather"])
def test_expert_parallel_equals_one_process(kind: str, case: str, sizes: list[int]) -> None:
    compare(Spread({"kind": kind}, ep=len(sizes)), case, sizes)


# ep, etp, kind
MAPPINGS = [
    (2, 2, "all_to_all"),
    (2, 2, "all_gather"),
    (1, 2, "local"),
    (1, 2, "auto"),
    (1, 2, "all_gather"),
    (4, 2, "all_to_all"),
    (4, 2, "all_gather"),
]
SIZES = {
    2: {"dropless": [7, 12], "biases": [5, 0], "hot expert": [0, 6], "drops": [20, 9]},
    4: {"dropless": [5, 9, 3, 8], "biases": [0, 12, 0, 1], "hot expert": [4, 0, 5, 3], "drops": [9, 0, 16, 5]},
    8: {"dropless": [3, 0, 9, 1, 0, 0, 4, 2], "biases": [2, 3, 1, 4, 0, 5, 2, 2], "drops": [9, 0, 16, 5, 0, 9, 1, 8]},
}


ETP_CASES = [(*mapping, case, sizes) for mapping in MAPPINGS for case, sizes in SIZES[mapping[0] * mapping[1]].items()]


@pytest.mark.parametrize(("ep", "etp", "kind", "case", "sizes"), ETP_CASES, ids=lambda v: str(v))
def test_experts_split_over_ranks_equal_one_process(ep: int, etp: int, kind: str, case: str, sizes: list[int]) -> None:
    """The ranks that share an expert hold different tokens, and other numbers of them; every gradient is complete."""
    compare(Spread({"kind": kind}, ep, etp), case, sizes)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(("kind", "collectives"), [("all_to_all", 2), ("all_gather", 4)])
def test_recompute_of_split_experts_exchanges_no_integers_again(kind: str, collectives: int, recompute: str) -> None:
    sent = compare(Spread({"kind": kind}, 2, 2, recompute), "biases", [5, 9, 3, 8])
    for of_rank in sent:
        assert sum(s.dtype == "int64" for s in of_rank) == collectives


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_all_to_all_moves_the_fewest_bytes_and_counts_once(recompute: str) -> None:
    """A rank sends each row whose expert is elsewhere once there; outputs come back once; gradients mirror both."""
    sizes, world = [11, 6, 0, 9], 4
    owner = owners("dropless", sizes, world)
    rows = [[int((owner[r] == s).sum()) for s in range(world)] for r in range(world)]
    sent = compare(Spread({"kind": "all_to_all"}, world, recompute=recompute), "dropless", sizes)
    for rank, of_rank in enumerate(sent):
        ints = [list(s.bytes_to.values()) for s in of_rank if s.dtype == "int64"]
        floats = [[n // (D * 8) for n in s.bytes_to.values()] for s in of_rank if s.dtype == "float64"]
        assert ints == [[E // world * 8] * world], "one exchange of counts, also with recomputation"
        there, back = rows[rank], [rows[source][rank] for source in range(world)]
        # Dispatch and combine, again when recomputed, then their gradients in reverse order.
        assert floats == [there, back] * (2 if recompute == "full" else 1) + [there, back]


def test_ranks_that_share_experts_trade_each_row_once() -> None:
    """etp: the rows that all-to-all brought to a rank go once to its peer, and their outputs come back once."""
    sizes, ep, etp = [5, 9, 3, 8], 2, 2
    owner = owners("dropless", sizes, ep)
    sent = compare(Spread({"kind": "all_to_all"}, ep, etp), "dropless", sizes)
    for rank, of_rank in enumerate(sent):
        i, j = divmod(rank, etp)
        peer = i * etp + 1 - j
        held = {r: sum(int((owner[k * etp + r % etp] == i).sum()) for k in range(ep)) for r in (rank, peer)}
        rows = [s.bytes_to[peer] // (D * 8) for s in of_rank if s.dtype == "float64" and peer in s.bytes_to]
        # Rows there, outputs back; then the gradients of the outputs, and of the rows.
        assert rows == [held[rank], held[peer], held[rank], held[peer]]


def test_auto_is_local_on_one_rank_and_all_to_all_on_more() -> None:
    assert type(build_dispatcher({"kind": "auto"}, E, None)).__name__ == "LocalDispatcher"
    assert (
        run_ranks(2, _auto_and_refusals)
        == [
            (
                "AllToAllDispatcher",
                "dispatch=local needs all experts on every rank, but parallel.ep=2; "
                "use dispatch=all_to_all or parallel.ep=1",
                "model.moe.num_experts=9 experts cannot be split evenly over parallel.ep=2 ranks; "
                "make ep a divisor of num_experts",
            )
        ]
        * 2
    )


def _auto_and_refusals() -> tuple[str, str, str]:
    group, messages = dist.group.WORLD, []
    for kind, n_experts in (("local", E), ("auto", 9)):
        with pytest.raises(ConfigError) as error:
            build_dispatcher({"kind": kind}, n_experts, group)
        messages.append(str(error.value))
    return type(build_dispatcher({"kind": "auto"}, E, group)).__name__, messages[0], messages[1]
