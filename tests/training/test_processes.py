import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

from torchtune_fused import patch_model
from torchtune_fused.flops import training_flops
from torchtune_fused.training.processes import Processes, start_processes


@pytest.fixture
def alone(tmp_path):
    """A process group of one, which is sharded as one of many is."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield Processes(1, 0, torch.device("cpu"))
    dist.destroy_process_group()


class SeenOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split("::")[-1].split(".")[0])
        return func(*args, **kwargs or {})


def clean(name):
    return name.replace("_checkpoint_wrapped_module.", "")


def test_fused_modules_run_fused_on_sharded_parameters(alone):
    torch.manual_seed(0)
    model = llama3_2(
        vocab_size=50,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=16,
        intermediate_dim=48,
    )
    whole = copy.deepcopy(model)
    patch_model(model)
    set_activation_checkpointing(model, {TransformerSelfAttentionLayer})
    alone.shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    # MFU counts the same whether parameters are spread or not.
    assert training_flops(model, 2, 9) == training_flops(whole, 2, 9)
    tokens = torch.randint(0, 50, (2, 9))
    with SeenOps() as seen:
        model(tokens)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FSDP2")  # of what would trouble users
        logits = model(tokens)
    assert {"rms_norm", "gated_mlp"} <= seen.names
    expected = whole(tokens)
    # fp32 sums in another order.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    upstream = torch.randn_like(logits)
    logits.backward(upstream)
    expected.backward(upstream)
    gradients = alone.gather({clean(name): p.grad for name, p in model.named_parameters()})
    for name, parameter in whole.named_parameters():
        atol = 1e-5 * parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=atol, msg=name)
    gathered = alone.gather(model.state_dict())
    assert gathered.keys() == whole.state_dict().keys()
    assert all(gathered[name].equal(weight) for name, weight in whole.state_dict().items())


def test_one_process_needs_no_others():
    with start_processes(torch.device("cpu")) as processes:
        assert not dist.is_initialized()
        assert (processes.count, processes.rank, processes.is_first) == (1, 0, True)
        assert processes.sum(torch.tensor(3)) == 3
        processes.wait()
