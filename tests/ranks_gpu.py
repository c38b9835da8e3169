"""What the processes of `test_peers_triton.py` compute, each with a GPU of its own."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from models import random_ids, randomise
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM
from modeling_xlstm.graphs_xlstm import graphs_of
from modeling_xlstm.tensor_parallel_rows import Rows


DTYPES = (torch.float32, torch.bfloat16)
CONFIG: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 3, "num_heads": 4, "vocab_size": 300}
TEXTS = ((1, 8192), (3, 2731))  # of which GPUs cannot share the second evenly


def save_all(folder: Path) -> None:
    for dtype in DTYPES:
        model: Any = XLSTMForCausalLM(XLSTMConfig(**CONFIG))
        randomise(model)
        model.to(dtype).save_pretrained(folder / str(dtype))


def wrong_sums() -> int:
    """How many of many sums are not right to the bit, of GPUs that wait for each other."""
    from modeling_xlstm.linear_triton import multiply
    from modeling_xlstm.peers_triton import peers_of

    device = torch.device("cuda", torch.cuda.current_device())
    peers, D, wrong = peers_of(dist.group.WORLD, device), 512, 0
    for M, dtype in ((1, torch.float32), (3, torch.bfloat16), (64, torch.bfloat16)):
        eye = torch.eye(D, dtype=dtype, device=device)
        residual = torch.randn(M, D, generator=torch.Generator().manual_seed(M)).to(device, torch.bfloat16)
        terms = torch.randn(40, M, D, device=device).to(dtype)
        everyone = [torch.empty_like(terms) for _ in range(peers.world)]
        dist.all_gather(everyone, terms)
        sums = []
        for i, term in enumerate(terms):
            if (i + peers.rank) % 7 == 0:
                torch.cuda._sleep(200_000)
            out, copies = peers.term(i % 2, residual)
            multiply(term, eye, out=out, copies=copies)
            sums.append(peers.total(i % 2, residual))
        for i, total in enumerate(sums):
            expected = residual.float()
            for term in everyone:
                expected = expected + term[i].float()
            wrong += not torch.equal(total, expected.bfloat16())
    return wrong


@torch.no_grad()
def of_model(folder: Path, dtype: torch.dtype) -> dict[Any, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    load: Any = AutoModelForCausalLM.from_pretrained
    shared = load(folder, dtype=dtype, distributed_config=DistributedConfig(tp_size=dist.get_world_size()))
    one, oracle = load(folder, dtype=dtype).to(device), load(folder, dtype=torch.float32).to(device).double()
    heads = slice(*(CONFIG["num_heads"] // dist.get_world_size() * (dist.get_rank() + i) for i in (0, 1)))
    result: dict[Any, Any] = {}

    def compare(what: str, key: Any, *tensors: Tensor) -> None:
        result.setdefault((what, dtype), {})[key] = tuple(x.cpu() for x in tensors)

    for B, T in TEXTS:
        ids = random_ids(B, T).to(device)
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        read = mock.Mock(side_effect=Rows.block)
        with mock.patch.object(Rows, "block", lambda *args, read=read: read(*args)):
            outputs = [x(ids, attention_mask=mask, logits_to_keep=2) for x in (shared, one, oracle)]
        assert read.call_count == CONFIG["num_hidden_layers"] - 1
        compare("logits", (B, T), *(x.logits for x in outputs))
        for i in range(CONFIG["num_hidden_layers"]):
            states = [x.past_key_values.layers[i].state.cell.C for x in outputs]
            compare("state", (B, T, i), states[0], *(x[:, heads] for x in states[1:]))
    options: dict[str, Any] = {
        "max_new_tokens": 24,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    texts = [x.generate(random_ids(2, 9).to(device), **options) for x in (shared, one)]
    result["text", dtype], result["text of one", dtype] = (x.sequences.cpu() for x in texts)
    result["graphs", dtype] = len(graphs_of(shared).steps)
    steps = oracle(texts[0].sequences).logits[:, 8:-1]
    alone = one(texts[0].sequences).logits[:, 8:-1]
    compare("last logits", "steps", torch.stack(texts[0].logits, 1).to(dtype), alone, steps)
    return result


def everything(rank: int, folder: Path) -> dict[Any, Any]:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.destroy_process_group()
    dist.init_process_group("nccl", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    results: dict[Any, Any] = {"wrong sums": wrong_sums()}
    for dtype in DTYPES:
        results |= of_model(folder / str(dtype), dtype)
    return results
