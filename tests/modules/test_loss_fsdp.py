"""The loss with a decoder sharded by FSDP2, two processes against one with torchtune's loss."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchtune.modules.loss import CEWithChunkedOutputLoss

WORKER = runpy.run_path(str(Path(__file__).with_name("loss_worker.py")))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes saw."""
    scratch = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER["__file__"], scratch, str(rank), "2"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(scratch / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", WORKER["CASES"], ids=str)
def test_two_ranks_train_as_one_process(case, ranks):
    model, loss = WORKER["build"](case[0]), CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)
    batches = [WORKER["batch"](rank) for rank in range(2)]
    losses, weights = WORKER["train"](model, loss, batches, lambda p: p)
    for rank in ranks:
        found, whole = rank[case]
        # fp32 sums in another order, through three steps of plain gradient descent.
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=0)
        for name, weight in weights.items():
            torch.testing.assert_close(whole[name], weight, rtol=0, atol=1e-5)
