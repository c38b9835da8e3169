"""What GPUs of one host do together, and the kernels of it that one can run, or Triton's interpreter."""

import pytest
import ranks
import ranks_gpu
import torch
from numerics import assert_matches
from triton_device import DEVICE, GPU, needs_somewhere_to_run

from modeling_xlstm import peers_triton
from modeling_xlstm.peers_triton import add_norm_kernel


pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_somewhere_to_run
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])])
@pytest.mark.parametrize("others", [None, 1, 3])
@pytest.mark.parametrize("R, D", [(3, 40), (5, 128)])
def test_rows_are_added_up_and_normalised(R, D, others, dtype):
    x, own, norm = torch.randn(R, D).to(dtype), torch.randn(R, D).to(dtype), (1 + torch.randn(D) / 4).to(dtype)
    terms = torch.randn(others or 1, R, D).to(dtype)
    expected = x.double() if others is None else x.double() + own.double() + terms.double().sum(0)
    total, y = x.to(DEVICE), torch.full((R, D), torch.nan, dtype=dtype, device=DEVICE)
    own, norm, terms = own.to(DEVICE), norm.to(DEVICE), terms.to(DEVICE)
    add_norm_kernel[(R,)](total, own, terms, norm, y, R, D, 1e-6, OTHERS=-1 if others is None else others, BD=128)
    assert_matches(total.cpu(), expected, expected.to(dtype))
    given = total.cpu().double()
    oracle = torch.rms_norm(given, (D,), norm.cpu().double(), 1e-6)
    assert_matches(y.cpu(), oracle, torch.rms_norm(total.cpu(), (D,), norm.cpu(), 1e-6))


@pytest.mark.parametrize("rank, world", [(0, 2), (1, 2), (1, 3), (2, 3)])
def test_terms_are_written_where_the_others_look_for_them(rank, world, monkeypatch):
    D, flags = 8, 2 * peers_triton.PROGRAMS * world
    memory = [torch.full((flags + 2 * world * peers_triton.ROWS * D,), torch.nan) for _ in range(world)]
    monkeypatch.setattr(peers_triton, "shared_memory_of", lambda *_: (None, memory))
    monkeypatch.setattr(peers_triton.Peers, "_settle", lambda _: None)
    peers = object.__new__(peers_triton.Peers)
    peers.rank, peers.world, peers.group, peers.device, peers._terms = rank, world, None, torch.device("cpu"), {}
    for place, M in ((0, 1), (1, 5)):
        here, copies = peers.term(place, torch.empty(M, D))
        assert here.shape == (M, D)
        at = here.data_ptr() - memory[rank].data_ptr()
        others = [x for i, x in enumerate(memory) if i != rank]
        assert copies.tolist() == [x.data_ptr() + at for x in others]
    assert (memory[rank] == 0).all()
    assert all(x.isnan().all() for x in others)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gpus")
    ranks_gpu.save_all(folder)
    return ranks.run(ranks_gpu.everything, 2, tmp_path_factory.mktemp("ranks"), folder, timeout=300)


@needs_two_gpus
def test_sums_of_all_gpus_are_right_to_the_bit_whoever_is_late(together):
    assert [result["wrong sums"] for result in together] == [0, 0]


@needs_two_gpus
@pytest.mark.parametrize("dtype", ranks_gpu.DTYPES)
@pytest.mark.parametrize("what", ["logits", "state", "last logits"])
def test_gpus_that_share_a_model_compute_what_one_does(what, dtype, together):
    """Long texts, padded and of a number of tokens that GPUs cannot share evenly, and steps of `generate`."""
    for result in together:
        for key, (actual, one, oracle) in result[what, dtype].items():
            assert_matches(actual, oracle, one, str(key))


@needs_two_gpus
def test_steps_of_gpus_that_share_a_model_are_replayed(together):
    assert all(result["graphs", dtype] > 0 for result in together for dtype in ranks_gpu.DTYPES)
    for dtype in ranks_gpu.DTYPES:
        texts = [result["text", dtype] for result in together]
        assert torch.equal(*texts)
    for result in together:
        assert torch.equal(result["text", torch.float32], result["text of one", torch.float32])
