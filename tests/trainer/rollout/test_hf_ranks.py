"""The built-in sampler under FSDP."""

import os
import subprocess
import sys
from pathlib import Path

RANKS = """
import torch
from dgrpo.distributed import leave, ranks, start
from dgrpo.trainer.policy.fsdp import shard
from dgrpo.trainer.rollout import HFSampler, Sampling
from tests.trainer.rollout.models import make_policy, make_prompts, tokens

torch.set_num_threads(1)
start("cpu")
rank = ranks().rank
prompts = make_prompts()
plain = HFSampler(make_policy())
policy = shard(make_policy(), ranks().mesh)
sampler = HFSampler(policy)
for part in ([0, 2], [0, 5]):  # rank 1 has three prompts, then none
    own = prompts[: part[1]] if rank == 0 else prompts[part[1] :]
    sampling = Sampling(max_tokens=4 if rank else 30, seed=9)
    got = tokens(sampler.generate(own, 3, sampling))
    assert got == tokens(plain.generate(own, 3, sampling)), (rank, part)
assert all(type(p.data).__name__ == "DTensor" for p in policy.parameters()), "sharded again"
ranks().totals([1])  # waits for the other rank
del plain, policy, sampler
leave()
"""


def test_two_ranks_with_other_prompts_and_lengths(tmp_path):
    """Under FSDP each rank draws what one process draws, however long the others take."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    root = Path(__file__).parents[3]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            script,
        ],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
